"""The walk through one block, site by site: every batch stops at a site until the site's readers are quantized, then goes on.

So the block runs once, and each site sees its input as it will be at run time: from quantized predecessors. Two ways to stop:
- suspended: each batch's forward pass is a coroutine (greenlet) that waits inside the block; its intermediate values stay in memory;
- replayed: the pass is broken off at the site and started anew for the next one; two to three times the arithmetic, no waiting values.
Both compute the same bits. Several workers share the batches; a batch stays with its worker, for a coroutine cannot leave the thread it began in.

Shape suffixes: T tokens of a batch, C channels of a site.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident

import greenlet
from torch import Tensor, nn

from ...quant.errors import PlanishError
from ...quant.linear import QuantizedInput
from ..blocks.experts import seeing_all
from ..blocks.sites import Site
from ..compressed.quantized import put
from ..machine.workers import Workers

CORRECT = "A block runs its sites in the order in which its family's table lists them: correct the table in calib/blocks/families.py."


class _Broken(Exception):
    """Ends a forward pass at the site where it was to stop. Never leaves this module."""


@dataclass(slots=True, eq=False)
class Pass:
    """One batch's forward pass through the block. x is the input of the site it stands at: (T, C)."""

    run: Callable[[], Tensor]
    prepared: "Prepared | None" = None
    x: Tensor | None = None
    output: Tensor | None = None
    thread: greenlet.greenlet | None = None


@dataclass(slots=True, eq=False)
class Prepared:
    """The quantized input of a site, made once for all its readers. left: the left factor of their products, when the first of them has made it.

    whole: the transformed input before it is quantized, likewise, where anything runs beside the codes."""

    site: str
    quantized: QuantizedInput
    left: Tensor | None = None
    whole: Tensor | None = None


_current: ContextVar[Pass] = ContextVar("current")  # the pass whose code runs: coroutines and threads have each their own


class _Tap(nn.Module):
    """Stands where a reader is."""

    def __init__(self, walk: "SiteWalk", site: str, reader: str) -> None:
        super().__init__()
        self.walk, self.site, self.reader = walk, site, reader

    def forward(self, x: Tensor) -> Tensor:
        walk, current = self.walk, _current.get()
        if self.site not in walk.settled:
            walk.stop(self.site, x, current)
        y = walk.settled[self.site](self.reader, x.reshape(-1, x.shape[-1]), current)
        return y.reshape(*x.shape[:-1], y.shape[-1])


Reader = Callable[[str, Tensor, Pass], Tensor]
"""reader(path, x, pass): the output (T, O) of the site's reader at that path."""


class SiteWalk:
    """Takes the passes of all batches from site to site of one block. Use inside `walking`."""

    def __init__(self, sites: Sequence[Site], passes: Sequence[Pass], replay: bool, workers: Workers) -> None:
        self.sites, self.passes, self.replay, self.workers = sites, passes, replay, workers
        self.settled: dict[str, Reader] = {}
        self._goal: str | None = None
        self._standing: str | None = None

    def stop(self, site: str, x: Tensor, current: Pass) -> None:
        """Called from inside a pass that reached an unsettled site: hands over x and waits there (or breaks off). PlanishError: another was next."""
        if site != self._goal:
            raise PlanishError(f"the block came to site {site} while {self._goal or 'its end'} was next. {CORRECT}")
        current.x = x.reshape(-1, x.shape[-1])
        if self.replay:
            raise _Broken
        assert current.thread is not None
        assert current.thread.parent is not None
        current.thread.parent.switch()

    def arrivals(self, site: str, then: Callable[[Pass], None] | None = None) -> Iterator[Pass]:
        """Brings the passes to `site`, in order; each yielded pass has its x. PlanishError: the block runs past the site.

        then: called with each pass that came, by the worker that brought it. May be called again as long as the site is not settled.
        """
        self._goal = site

        def bring(pass_: Pass) -> Pass:
            if self._standing != site:
                self._advance(pass_)
            if pass_.x is None:
                raise PlanishError(f"the block came to its end while site {site} was next. {CORRECT}")
            if then is not None:
                then(pass_)
            return pass_

        for pass_ in self.workers.map(bring, self.passes, ahead=not self.replay):
            yield pass_
            if self.replay:
                pass_.x = pass_.prepared = None
        self._standing = None if self.replay else site

    def settle(self, site: str, reader: Reader) -> None:
        """From now on the site's readers compute this; passes that wait there may go on."""
        self.settled[site] = reader

    def outputs(self) -> Iterator[Tensor]:
        """The block's output for each batch, in order. PlanishError: a site is not settled."""
        self._goal = None
        for pass_ in self.workers.map(self._advance, self.passes, ahead=not self.replay):
            assert pass_.output is not None
            yield pass_.output
            pass_.output = pass_.thread = pass_.x = None

    def abandon(self) -> None:
        """End the passes that still wait inside the block."""
        if any(pass_.thread is not None for pass_ in self.passes):
            list(self.workers.map(self._end, self.passes))

    @staticmethod
    def _end(pass_: Pass) -> None:
        if pass_.thread is not None and not pass_.thread.dead:
            pass_.thread.throw()

    def _advance(self, pass_: Pass) -> Pass:
        pass_.x = None
        if self.replay:
            with suppress(_Broken):
                self._whole(pass_)
        elif pass_.thread is None:
            pass_.thread = greenlet.greenlet(self._whole)
            pass_.thread.switch(pass_)
        else:
            pass_.thread.switch()
        return pass_

    @staticmethod
    def _whole(pass_: Pass) -> None:
        before = _current.set(pass_)
        try:
            pass_.output = pass_.run()
        finally:
            _current.reset(before)


@contextmanager
def replaced(block: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """While the `with` lasts, other modules stand at these paths of the block."""
    before = {path: block.get_submodule(path) for path in stand_ins}
    for path, module in stand_ins.items():
        put(block, path, module)
    try:
        yield
    finally:
        for path, module in before.items():
            put(block, path, module)


@contextmanager
def walking(block: nn.Module, sites: Sequence[Site], passes: Sequence[Pass], replay: bool, workers: int = 1) -> Iterator[SiteWalk]:
    """A SiteWalk over `passes`, whose `run` calls `block`; the block's readers are taps while the `with` lasts."""
    with Workers(workers) as crew:
        walk = SiteWalk(sites, passes, replay, crew)
        with seeing_all(block), replaced(block, {path: _Tap(walk, site.name, path) for site in sites for path in site.readers}):
            try:
                yield walk
            finally:
                walk.abandon()


@dataclass(slots=True, eq=False)
class SiteInputs:
    """What a block's sites have been given: by thread, for each worker runs the block on its own."""

    _seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def take(self) -> dict[str, Tensor]:
        """The sites' inputs of this thread's last run, and let go of them: site name -> (T, C)."""
        return self._seen.pop(get_ident())

    def note(self, site: str, x: Tensor) -> None:
        """The site's input in this thread."""
        self._seen.setdefault(get_ident(), {})[site] = x.reshape(-1, x.shape[-1])


@contextmanager
def site_inputs(block: nn.Module, sites: Sequence[Site]) -> Iterator[SiteInputs]:
    """While the `with` lasts, each run of the block leaves its sites' inputs there."""
    seen = SiteInputs()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.note(name, inputs[0])

    handles = [block.get_submodule(site.readers[0]).register_forward_pre_hook(note(site.name)) for site in sites]
    try:
        with seeing_all(block):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
