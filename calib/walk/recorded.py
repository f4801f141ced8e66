"""A block's run up to a site, recorded: while only what comes at the site or after it changes, the way there need not be computed again.

Modules that had returned before the site's readers were called stand still: each gives the very tensors that it returned. What lies between them
(residual additions, rotary embeddings, attention itself) runs as ever, so the block computes the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from ..blocks.experts import seeing_all
from ..blocks.sites import Site


class Recorded(nn.Module):
    """Stands for a module that returned `output`."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_inputs: object, **_options: object) -> object:
        """What the module returned."""
        return self.output


@contextmanager
def recording(block: nn.Module, sites: Sequence[Site]) -> Iterator[Mapping[str, dict[str, nn.Module]]]:
    """While the `with` lasts, a run of the block leaves behind, for each site, what can stand still on the way to it: by path, as calib.walk.replaced
    takes them. Run it once, in one thread."""
    paths = {module: path for path, module in block.named_modules() if path}
    before: dict[str, dict[str, nn.Module]] = {}
    returned: dict[str, nn.Module] = {}
    again: set[str] = set()  # which give something else each time

    def arrive(site: Site, *_called: object) -> None:
        if site.name not in before:
            still = {path: module for path, module in returned.items() if path not in again}
            before[site.name] = {path: module for path, module in still.items() if not _inside(path, still)}

    def leave(module: nn.Module, _inputs: object, output: object) -> None:
        path = paths[module]
        again.update({path} & returned.keys())
        returned[path] = Recorded(output)

    handles = [module.register_forward_hook(leave) for module in paths]
    for site in sites:
        handles += [block.get_submodule(path).register_forward_pre_hook(partial(arrive, site)) for path in site.readers]
    try:
        with seeing_all(block):
            yield before
    finally:
        for handle in handles:
            handle.remove()


def _inside(path: str, still: Mapping[str, object]) -> bool:
    """Whether a module around this one stands still."""
    parts = path.split(".")
    return any(".".join(parts[:count]) in still for count in range(1, len(parts)))
