"""What must hold for an installed planish, wherever it lies: every module imports with the core requirements alone."""

import importlib
import pkgutil
from importlib.metadata import version
from importlib.resources import files

import pytest

import planish

ELSEWHERE = ("planish.serving.vllm_config", "planish.serving.vllm_prefix")  # import inside vLLM's environment only, see test_vllm_plugin.py
MODULES = sorted({module.name for module in pkgutil.walk_packages(planish.__path__, "planish.")} - set(ELSEWHERE))

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_the_rooms_are_there() -> None:
    assert {"planish.quant.formats", "planish.calib", "planish.eval"} <= set(MODULES)


def test_shipped_recipes_are_there() -> None:
    assert [entry.name for entry in files("planish").joinpath("recipes").iterdir() if entry.name.endswith(".yaml")]


def test_the_distribution_has_a_version() -> None:
    assert version("planish")
