"""Progress at the terminal: a live line for each stage, or plain lines where standard error is no terminal."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from ..common.units import duration

RECENT = 8  # steps whose time says how long the others will take
COUNTED = 10_000  # a stage of more steps is shown in percent
SILENCE = 10.0  # seconds between plain lines of steps that have nothing to say


@dataclass(slots=True)
class Stage:
    """One stage and its clock. steps: how many there are; done: how many are over; marks: how many were when, of late."""

    name: str
    steps: int
    done: int = 0
    start: float = field(default_factory=lambda: time.monotonic())
    marks: list[tuple[int, float]] = field(default_factory=list)

    def step(self, done: int) -> None:
        """So many steps are over now."""
        self.done = done
        if self.steps <= COUNTED:
            self.marks = [*self.marks[-RECENT:], (done, time.monotonic())]

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self.done >= self.steps

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float | None:
        """Seconds until the end, by the median time of the latest steps; None when nothing is known."""
        marks = [(0, self.start), *self.marks] if self.done == len(self.marks) else self.marks
        steps = [(after - before) / (more - fewer) for (fewer, before), (more, after) in pairwise(marks) if more > fewer]
        return statistics.median(steps) * (self.steps - self.done) if steps else None

    def count(self) -> str:
        """12/30, or 40 %."""
        return f"{self.done}/{self.steps}" if self.steps <= COUNTED else f"{self.done / self.steps:.0%}".replace("%", " %")

    def time(self) -> str:
        """What is left, or what it took."""
        left = self.left()
        return duration(self.elapsed) if self.over else "" if left is None else f"{duration(left)} left"


class Told(Protocol):
    """Whatever is told of stages and steps."""

    def stage(self, name: str, steps: int) -> None:
        """A stage of so many steps begins."""

    def step(self, done: int, note: str = "") -> None:
        """So many steps of the stage are done."""


class Plain:
    """A line for every step that has something to say, without control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = Stage("", 0)
        self._said = time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, soft_wrap=True, markup=False)

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage."""
        self._stage = Stage(name, steps)
        self._said = time.monotonic()
        self.say(name)

    def step(self, done: int, note: str = "") -> None:
        """A line if there is a note, if the stage is over, or if it has been quiet for long."""
        stage = self._stage
        stage.step(done)
        if note or stage.over or time.monotonic() - self._said > SILENCE:
            self._said = time.monotonic()
            self.say(", ".join(part for part in (f"{stage.name} {stage.count()}", note, stage.time()) if part))


class Live:
    """One line for each stage, with a bar, the latest note and an estimate of the time left. Use inside `with live.shown():`."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description:<21}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]:>7}", markup=False),
            TextColumn("{task.fields[time]:>15}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._stage = Stage("", 0)
        self._task: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The lines stay on the terminal afterwards."""
        with self._bars:
            yield

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(Text(text), soft_wrap=True)

    def stage(self, name: str, steps: int) -> None:
        """Begin a stage, on a new line."""
        self._stage = Stage(name, steps)
        self._task = self._bars.add_task(name, total=steps, count="", time="", note="")

    def step(self, done: int, note: str = "") -> None:
        """Move the bar."""
        assert self._task is not None
        self._stage.step(done)
        self._bars.update(self._task, completed=done, count=self._stage.count(), time=self._stage.time(), note=note)


@contextmanager
def showing(console: Console) -> Iterator[Plain | Live]:
    """Progress on this console while the `with` lasts."""
    if not console.is_terminal:
        yield Plain(console)
        return
    live = Live(console)
    with live.shown():
        yield live
    console.print()


def stages(progress: Told) -> Callable[[str, int, int], None]:
    """A function of a stage's name, steps done and steps in all that begins a stage when its name is new."""
    current = ""

    def report(name: str, done: int, total: int) -> None:
        nonlocal current
        if name != current:
            current = name
            progress.stage(name, total)
        progress.step(done)

    return report
