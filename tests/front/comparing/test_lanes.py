"""planish.comparing.lanes: as many at once as jobs and memory allow, one progress for all, and nobody left running."""

import threading
import time
from collections.abc import Callable

import pytest

from planish.comparing.lanes import side_by_side
from planish.walk.callbacks import Progress

Started = Callable[[Callable[[], None]], None]


class Told:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[int] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage(self, name: str, steps: int) -> None:
        self.stages.append((name, steps))

    def step(self, done: int, note: str = "") -> None:
        self.steps.append(done)


def run(needs: dict[str, int], jobs: int, room: int) -> tuple[list[str], int, Told]:
    """The order in which they ended, the most bytes at once, and what was told."""
    lock, at_once, most, told = threading.Lock(), [0], [0], Told()

    def work(name: str, progress: Progress, _started: Started) -> str:
        with lock:
            at_once[0] += needs[name]
            most[0] = max(most[0], at_once[0])
        progress.say(name)
        progress.stage("blocks", 3)
        progress.step(3)
        progress.stage("texts", 2)
        progress.step(1)
        time.sleep(0.02)
        with lock:
            at_once[0] -= needs[name]
        return name.upper()

    found = list(side_by_side(work, list(needs), jobs=jobs, needs=needs, room=room, steps=5, progress=told))
    assert all(result == name.upper() for name, result in found)
    return [name for name, _ in found], most[0], told


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_all_are_done_and_the_progress_is_one(jobs: int) -> None:
    order, most, told = run(dict.fromkeys("abcde", 1), jobs, 100)
    assert sorted(order) == list("abcde")
    assert most <= jobs
    assert sorted(told.said) == list("abcde")
    if jobs > 1:
        assert told.stages == [("recipes", 25)]
        assert told.steps == sorted(told.steps)
        assert told.steps[-1] == 25


def test_no_more_at_once_than_fit_in_memory() -> None:
    order, most, _ = run({"large": 9, "other": 9, "small": 2}, 3, 11)
    assert most <= 11
    assert sorted(order) == ["large", "other", "small"]
    assert run({"a": 50, "b": 50}, 2, 11)[1] == 50  # what fits nowhere runs alone


def test_when_one_fails_the_others_are_stopped() -> None:
    stopped = threading.Event()

    def work(name: str, _progress: Progress, started: Started) -> None:
        if name == "bad":
            time.sleep(0.05)
            raise ValueError("refused")
        started(stopped.set)
        assert stopped.wait(10)

    with pytest.raises(ValueError, match="refused"):
        list(side_by_side(work, ["long", "bad", "never"], jobs=2, needs=dict.fromkeys(("long", "bad", "never"), 1), room=9, steps=1, progress=Told()))
    assert stopped.is_set()
