"""Comparisons whose recipes run in this process: quick, where processes are not what is tested."""

import io
import json

import pytest

from planish.common.decode import decode, encode
from planish.comparing.child import Channel, Task, work
from planish.comparing.parent import Started, listen
from planish.walk.callbacks import Progress

MEASURE = ("--windows", "2", "--length", "64")


def run_here(task: Task, progress: Progress, _started: Started) -> object:
    """As run_child, everything said and returned through JSON."""
    out = io.StringIO()
    channel = Channel(out)
    channel.send("done", work(decode(Task, json.loads(json.dumps(encode(task))), "task"), channel))
    return listen(out.getvalue().splitlines(), task.recipe.name, progress)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes in this test."""
    monkeypatch.setattr("planish.comparing.job.run_child", run_here)
