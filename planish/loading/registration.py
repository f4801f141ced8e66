"""`import planish` lets `from_pretrained` load what planish wrote, without importing transformers itself.

transformers has extension points for that (register_quantizer), but no place where it would look for packages that use them; and importing it takes
seconds. So the registration waits for transformers.quantizers.auto to be imported, which from_pretrained does, and is done right after.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MODULE = "transformers.quantizers.auto"


def register() -> None:
    """Now, if transformers' registry is imported, else when it is."""
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from .auto import register_quantizer

    register_quantizer()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module where everybody else does, and has its loader register afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader's module, which keeps that loader; then the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
