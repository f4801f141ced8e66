"""Tests that need a process of their own: for what they set is set for good."""

import os
import subprocess
import sys
from pathlib import Path


def run_alone(file: Path, *options: str, **environment: str) -> str:
    """What pytest prints about a file of tests, all of which must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *options]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
