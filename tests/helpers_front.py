"""The command line under test."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from planish.cli import app

SHORT = ("--set", "calibration.samples=4", "--set", "calibration.length=64")
"""Settings that make a shipped recipe quick."""


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


def invoke(*arguments: str | Path) -> Ran:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def start(*arguments: str | Path, folder: Path) -> "subprocess.Popen[str]":
    """Begin a command in a process of its own, which can be interrupted even where this one ignores that (as background jobs do)."""
    command = [sys.executable, "-m", "planish", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 300) -> None:
    """Until the file is there. Fails if the process ends before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file's content, and the folders, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
