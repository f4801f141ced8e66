"""The parent of a comparison's processes: starts one, passes its progress on, and stops it when it is stopped itself."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from ..common.decode import encode
from ..quant.errors import PlanishError

if TYPE_CHECKING:
    from ..walk.callbacks import Progress
    from .child import Task

Started = Callable[[Callable[[], None]], None]
"""Called when a process runs, with a function that tells it to stop and does not wait."""

GRACE = 20.0  # seconds that a stopped process has to end by itself
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from planish.comparing.child import main; main()"
_SHOWN = {"blocks": "blocks", "measuring": "texts"}  # stages that get a line, and its name


def run_child(task: "Task", progress: "Progress", started: Started = lambda _: None) -> dict[str, Any]:
    """Do the task in a new process that finds planish where this one does. What it returned; PlanishError with the recipe's name if refused."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C at the terminal is for the parent, which passes it on
        )
        started(partial(_tell_to_stop, process))
        try:
            found = _converse(process, task, progress)
            code = process.wait()
        finally:
            _stop(process)
        if found is None:
            errors.seek(0)
            raise _broken(task.recipe.name, code, errors)
    return found


def _converse(process: "subprocess.Popen[str]", task: "Task", progress: "Progress") -> dict[str, Any] | None:
    """Hand over the task and listen to the end. The result, None if there was none."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(encode(task)) + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # it is dead already, and its exit code says why
        return None
    return listen(process.stdout, task.recipe.name, progress)


def listen(lines: Iterable[str], name: str, progress: "Progress") -> dict[str, Any] | None:
    """Pass on what the process of that recipe says, but for the stages that are short. Its result, None if it says none; PlanishError for its own."""
    shown = False
    for line in lines:
        kind, *rest = json.loads(line)
        if kind == "error":
            raise PlanishError(f"recipe {name}: {rest[0]}")
        if kind == "done":
            found: dict[str, Any] = rest[0]
            return found
        if kind == "say":
            progress.say(f"{name}: {rest[0]}")
        elif kind == "stage":
            shown = rest[0] in _SHOWN
            if shown:
                progress.stage(f"{name}: {_SHOWN[rest[0]]}", rest[1])
        elif shown:
            progress.step(*rest)
    return None


def _tell_to_stop(process: "subprocess.Popen[str]") -> None:
    """It stops when its input ends, if it has not ended itself."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def _stop(process: "subprocess.Popen[str]") -> None:
    """End it if it runs: it stops when its input ends, and is killed if that takes too long, which costs it the block it was at."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout, suppress(BrokenPipeError, subprocess.TimeoutExpired):
        try:
            process.stdin.close()
            process.wait(GRACE)
        finally:
            process.kill()
            process.wait()


def _broken(name: str, code: int, errors: IO[str]) -> PlanishError | RuntimeError:
    """Why there was no result."""
    if code < 0:
        how = signal.Signals(-code).name
        why = " The system does so when memory runs out: see `planish plan`, and --offload-dir." if -code == signal.SIGKILL else ""
        return PlanishError(f"recipe {name}: its process was ended by {how}.{why} The same command goes on from there.")
    return RuntimeError(f"recipe {name}: its process failed with exit code {code}:\n{errors.read()}")
