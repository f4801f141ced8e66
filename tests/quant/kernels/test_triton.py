"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for every architecture; each in a process of its own."""

import importlib.util
from pathlib import Path

import pytest
from helpers_alone import run_alone

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here: pip install 'planish[kernels]'")


def test_interpreted_a_few() -> None:
    assert "2 passed" in run_alone(HERE / "interpreted.py", "-k", "every_byte or static", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_interpreted() -> None:
    assert "passed" in run_alone(HERE / "interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiled_for_every_architecture() -> None:
    assert "passed" in run_alone(HERE / "ahead.py")
