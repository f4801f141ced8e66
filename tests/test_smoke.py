"""What must hold for an installed planish, wherever it lies: every module imports with the core requirements, but for a few with an extra's."""

import importlib
import pkgutil
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec

import pytest

import planish

ELSEWHERE = tuple(
    f"planish.serving.vllm_{part}" for part in ("config", "experts", "operators", "prefix", "ranks")
)  # import inside vLLM's environment only, see test_vllm_plugin.py
MODULES = sorted({module.name for module in pkgutil.walk_packages(planish.__path__, "planish.")} - set(ELSEWHERE))

EXTRAS = {
    **dict.fromkeys(("planish.eval.tasks.harness", "planish.eval.tasks.served_lm", "planish.lm_eval"), "lm_eval"),
    **dict.fromkeys((name for name in MODULES if name.startswith("planish.quant.kernels.triton_")), "triton"),
    "planish.quant.kernels.cuda": "triton",
}
"""Modules that others import late, and what they need besides."""

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    if name in EXTRAS and find_spec(EXTRAS[name]) is None:
        with pytest.raises(ModuleNotFoundError, match=EXTRAS[name]):
            importlib.import_module(name)
    else:
        importlib.import_module(name)


def test_the_rooms_are_there() -> None:
    assert {"planish.quant.formats", "planish.calib", "planish.eval"} <= set(MODULES)


def test_shipped_recipes_are_there() -> None:
    assert [entry.name for entry in files("planish").joinpath("recipes").iterdir() if entry.name.endswith(".yaml")]


def test_the_distribution_has_a_version() -> None:
    assert version("planish")
