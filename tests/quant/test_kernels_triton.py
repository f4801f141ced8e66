"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for every architecture; each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here: pip install 'planish[kernels]'")


def run(file: str, *options: str, **environment: str) -> str:
    """pytest on a file of tests beside this one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file)), *options]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_interpreted_a_few() -> None:
    assert "2 passed" in run("kernels_interpreted.py", "-k", "every_byte or static", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_interpreted() -> None:
    assert "passed" in run("kernels_interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiled_for_every_architecture() -> None:
    assert "passed" in run("kernels_ahead.py")
