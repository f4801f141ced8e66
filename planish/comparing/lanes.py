"""Recipes side by side: so many at once, as far as memory goes, with one progress for all of them."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..walk.callbacks import Progress
    from .parent import Started

R = TypeVar("R")
Work = Callable[[str, "Progress", "Started"], R]
"""Does what has that name, tells the progress, and calls `started` with how to stop it."""


@dataclass(slots=True)
class Total:
    """The progress of all lanes as one stage of so many steps."""

    shown: "Progress"
    steps: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0
    begun: bool = False

    def add(self, steps: int, note: str) -> None:
        """So many steps more are done."""
        with self.lock:
            if not self.begun:
                self.shown.stage("recipes", self.steps)
                self.begun = True
            self.done = min(self.done + steps, self.steps)
            self.shown.step(self.done, note)

    def say(self, text: str) -> None:
        """Told on."""
        with self.lock:
            self.shown.say(text)


@dataclass(slots=True)
class Lane:
    """One recipe's progress, which adds to the total what it has done, at the end all of its steps."""

    total: Total
    steps: int
    name: str = ""
    before: int = 0
    told: int = 0

    def say(self, text: str) -> None:
        """Told on."""
        self.total.say(text)

    def stage(self, name: str, steps: int) -> None:
        """A stage's steps come on top of those before."""
        self.name, self.before = name, self.told

    def step(self, done: int, note: str = "") -> None:
        """What is new is added."""
        self._reach(min(self.before + done, self.steps), f"{self.name}, {note}" if note else self.name)

    def end(self) -> None:
        """All is done, whatever was told of."""
        self._reach(self.steps, "")

    def _reach(self, steps: int, note: str) -> None:
        if steps > self.told:
            self.total.add(steps - self.told, note)
            self.told = steps


def side_by_side(
    work: Work[R], names: Sequence[str], *, jobs: int, needs: Mapping[str, int], room: int, steps: int, progress: "Progress"
) -> Generator[tuple[str, R], None, None]:
    """work of every name, at most `jobs` at once, and of several only as many as need no more than `room` bytes; (name, result) as they end.

    needs: bytes by name. steps: of each. When one fails, or this generator is left, the others are stopped and waited for.
    """
    if jobs == 1:
        for name in names:
            yield name, work(name, progress, lambda _: None)
        return
    total, waiting, stops, over = Total(progress, steps * len(names)), list(names), list[Callable[[], None]](), threading.Event()
    running: dict[Future[R], str] = {}

    def started(stop: Callable[[], None]) -> None:
        stops.append(stop)
        if over.is_set():  # it began as the others were being stopped
            stop()

    def lane(name: str) -> R:
        own = Lane(total, steps)
        found = work(name, own, started)
        own.end()
        return found

    with ThreadPoolExecutor(jobs) as crew:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    taken = sum(needs[name] for name in running.values())
                    fitting = next((name for name in waiting if not running or taken + needs[name] <= room), None)
                    if fitting is None:
                        break
                    waiting.remove(fitting)
                    running[crew.submit(lane, fitting)] = fitting
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    yield name, future.result()
        finally:
            over.set()
            for stop in list(stops):
                stop()
