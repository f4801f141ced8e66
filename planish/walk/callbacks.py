"""Who is told of a run: whoever shows its progress, and loggers such as MLflow's or W&B's."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .records import BlockRecord


class Progress(Protocol):
    """Told of what happens; every method may return at once."""

    def say(self, text: str) -> None:
        """Something that the user should know."""

    def stage(self, name: str, steps: int) -> None:
        """A stage of so many steps begins."""

    def step(self, done: int, note: str = "") -> None:
        """So many steps of the stage are done."""


class Silent:
    """Progress that nobody sees."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stage(self, name: str, steps: int) -> None:
        """Nothing."""

    def step(self, done: int, note: str = "") -> None:
        """Nothing."""


class Callback(Silent):
    """Progress that also gets the numbers, to log them: derive from it and write the methods of interest; those here do nothing.

    They are called in the run's own thread, in order. What they raise ends the run; a compression then goes on where it was when it is called again.
    """

    def on_block(self, record: "BlockRecord") -> None:
        """A block is compressed. When a run goes on, its earlier blocks come first, once more."""

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        """Results by name. Of a compression: bits_per_weight, bytes, seconds. Of an evaluation: perplexity, kl, recovery.TASK and so on."""


class Told(Callback):
    """Passes everything on: progress to all, numbers to the callbacks."""

    def __init__(self, progress: Progress | None, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self._all: tuple[Progress, ...] = (*([progress] if progress else []), *self._callbacks)

    def say(self, text: str) -> None:
        """To all."""
        for one in self._all:
            one.say(text)

    def stage(self, name: str, steps: int) -> None:
        """To all."""
        for one in self._all:
            one.stage(name, steps)

    def step(self, done: int, note: str = "") -> None:
        """To all."""
        for one in self._all:
            one.step(done, note)

    def on_block(self, record: "BlockRecord") -> None:
        """To the callbacks."""
        for one in self._callbacks:
            one.on_block(record)

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        """To the callbacks."""
        for one in self._callbacks:
            one.on_metrics(metrics)
