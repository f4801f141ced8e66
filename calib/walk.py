"""The walk through one block, site by site: every batch stops at a site until the site's readers are quantized, then goes on.

So the block runs once, and each site sees its input as it will be at run time: from quantized predecessors. Two ways to stop:
- suspended: each batch's forward pass is a coroutine (greenlet) that waits inside the block; its intermediate values stay in memory;
- replayed: the pass is broken off at the site and started anew for the next one; two to three times the arithmetic, no waiting values.
Both compute the same bits.

Shape suffixes: T tokens of a batch, C channels of a site.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import greenlet
from torch import Tensor, nn

from ..quant.errors import PlanishError
from ..quant.linear import QuantizedInput
from .sites import Site

CORRECT = "A block runs its sites in the order in which its family's table lists them: correct the table in calib/families.py."


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


class _Tap(nn.Module):
    """Stands where a reader is."""

    def __init__(self, walk: "SiteWalk", site: str, reader: str) -> None:
        super().__init__()
        self.walk, self.site, self.reader = walk, site, reader

    def forward(self, x: Tensor) -> Tensor:
        walk = self.walk
        if self.site not in walk.settled:
            walk.stop(self.site, x)
        y = walk.settled[self.site](self.reader, x.reshape(-1, x.shape[-1]), walk.current)
        return y.reshape(*x.shape[:-1], y.shape[-1])


Reader = Callable[[str, Tensor, Pass], Tensor]
"""reader(path, x, pass): the output (T, O) of the site's reader at that path."""


class SiteWalk:
    """Takes the passes of all batches from site to site of one block. Use inside `walking`."""

    def __init__(self, sites: Sequence[Site], passes: Sequence[Pass], replay: bool) -> None:
        self.sites, self.passes, self.replay = sites, passes, replay
        self.settled: dict[str, Reader] = {}
        self.current = passes[0]
        self._goal: str | None = None
        self._standing: str | None = None

    def stop(self, site: str, x: Tensor) -> None:
        """Called from inside a pass that reached an unsettled site: hands over x and waits there (or breaks off). PlanishError: another was next."""
        if site != self._goal:
            raise PlanishError(f"the block came to site {site} while {self._goal or 'its end'} was next. {CORRECT}")
        self.current.x = x.reshape(-1, x.shape[-1])
        if self.replay:
            raise _Broken
        waiting = self.current
        assert waiting.thread is not None
        assert waiting.thread.parent is not None
        waiting.thread.parent.switch()
        self.current = waiting

    def arrivals(self, site: str) -> Iterator[Pass]:
        """Brings the passes to `site`, one after the other; each yielded pass has its x. PlanishError: the block runs past the site.

        May be called again as long as the site is not settled.
        """
        self._goal = site
        for pass_ in self.passes:
            if self._standing != site:
                self._advance(pass_)
            if pass_.x is None:
                raise PlanishError(f"the block came to its end while site {site} was next. {CORRECT}")
            yield pass_
            if self.replay:
                pass_.x = None
        self._standing = None if self.replay else site

    def settle(self, site: str, reader: Reader) -> None:
        """From now on the site's readers compute this; passes that wait there may go on."""
        self.settled[site] = reader

    def outputs(self) -> Iterator[Tensor]:
        """The block's output for each batch, in order. PlanishError: a site is not settled."""
        self._goal = None
        for pass_ in self.passes:
            self._advance(pass_)
            assert pass_.output is not None
            yield pass_.output
            pass_.output = pass_.thread = pass_.x = None

    def abandon(self) -> None:
        """End the passes that still wait inside the block."""
        for pass_ in self.passes:
            if pass_.thread is not None and not pass_.thread.dead:
                pass_.thread.throw()

    def _advance(self, pass_: Pass) -> None:
        self.current = pass_
        pass_.x = None
        if self.replay:
            try:
                pass_.output = pass_.run()
            except _Broken:
                return
            return
        if pass_.thread is None:
            pass_.thread = greenlet.greenlet(self._whole)
            pass_.thread.switch(pass_)
        else:
            pass_.thread.switch()

    @staticmethod
    def _whole(pass_: Pass) -> None:
        pass_.output = pass_.run()


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
def walking(block: nn.Module, sites: Sequence[Site], passes: Sequence[Pass], replay: bool) -> Iterator[SiteWalk]:
    """A SiteWalk over `passes`, whose `run` calls `block`; the block's readers are taps while the `with` lasts."""
    walk = SiteWalk(sites, passes, replay)
    with replaced(block, {path: _Tap(walk, site.name, path) for site in sites for path in site.readers}):
        try:
            yield walk
        finally:
            walk.abandon()


def put(block: nn.Module, path: str, module: nn.Module) -> None:
    """Let `module` stand at `path` of the block."""
    parent, _, child = path.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


@contextmanager
def site_inputs(block: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """While the `with` lasts, each run of the block leaves its sites' inputs in the dict: site name -> (T, C)."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return hook

    handles = [block.get_submodule(site.readers[0]).register_forward_pre_hook(note(site.name)) for site in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
