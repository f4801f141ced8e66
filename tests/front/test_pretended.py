"""planish on a GPU that is not there, and there with Triton's kernels in Triton's interpreter; each in a process of its own."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers_alone import run_alone

CASES = Path(__file__).with_name("gpu_cases.py")


def test_on_a_gpu() -> None:
    assert "passed" in run_alone(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["test_every_recipe and not paper", "test_every_step"])
def test_all_on_a_gpu(cases: str) -> None:
    """The papers' recipes are left to a real GPU: each of their steps is among the steps."""
    assert "passed" in run_alone(CASES, "-m", "slow", "-k", cases)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here: pip install 'planish[kernels]'")
def test_on_triton_s_kernels() -> None:
    assert "6 passed" in run_alone(CASES, "-k", "test_loaded and packed and not default", TRITON_INTERPRET="1")
