"""The walk through one block: suspended and replayed passes give the same bits, nothing is left behind, errors come out and the block is restored."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

import pytest
import torch
from torch import Tensor, nn

from planish.calib.blocks.sites import Site
from planish.calib.compressed.quantized import put
from planish.calib.walk.site_walk import Pass, Prepared, SiteWalk, replaced, site_inputs, walking
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat
from planish.quant.linear import quantize_input

SITES = (Site(name="in", readers=("a", "deep.b")), Site(name="out", readers=("c",)))
MODES = pytest.mark.parametrize("replay", [False, True], ids=["suspended", "replayed"])


class Toy(nn.Module):
    """Two readers of one input, then one of their product."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)
        self.deep = nn.Module()
        self.deep.b = nn.Linear(6, 6)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        self.runs = 0
        self.fail_at = -1

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == self.fail_at:
            raise ZeroDivisionError("inside the block")
        h = torch.tanh(self.a(x)) * self.deep.b(x)
        return x + self.c(h)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3 + i, 6, generator=generator) for i in range(count)]


@contextmanager
def walk_over(block: nn.Module, replay: bool, inputs: list[Tensor], sites: tuple[Site, ...] = SITES, workers: int = 1) -> Iterator[SiteWalk]:
    def start(x: Tensor) -> Callable[[], Tensor]:
        return lambda: block(x)

    with torch.no_grad(), walking(block, sites, [Pass(start(x)) for x in inputs], replay, workers) as walk:
        yield walk


def reader_of(layers: dict[str, nn.Module], factor: float = 1.0) -> Callable[[str, Tensor, Pass], Tensor]:
    return lambda path, x_TC, _pass: layers[path](x_TC) * factor


def whole(block: Toy, replay: bool, workers: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Walk with readers that depend on all batches' inputs: the sums seen at each site, and the outputs."""
    layers = {path: block.get_submodule(path) for site in SITES for path in site.readers}
    sums = []
    with walk_over(block, replay, batches(), workers=workers) as walk:
        for site in SITES:
            sums.append(torch.stack([pass_.x.abs().sum() for pass_ in walk.arrivals(site.name) if pass_.x is not None]).sum())
            walk.settle(site.name, reader_of(layers, float(sums[-1]) / 50))
        outputs = [output.clone() for output in walk.outputs()]
    return sums, outputs


@torch.no_grad()
def test_plain_readers_change_nothing() -> None:
    for replay in (False, True):
        block = Toy()
        layers = {path: block.get_submodule(path) for site in SITES for path in site.readers}
        seen = {}
        with walk_over(block, replay, batches()) as walk:
            for site in SITES:
                seen[site.name] = [pass_.x for pass_ in walk.arrivals(site.name)]
                walk.settle(site.name, reader_of(layers))
            outputs = list(walk.outputs())
        for x, output in zip(batches(), outputs, strict=True):
            torch.testing.assert_close(output, Toy()(x))
        assert [x.shape for x in seen["in"] if x is not None] == [(6, 6), (8, 6), (10, 6)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_suspended_and_replayed_and_shared_give_the_same_bits(workers: int) -> None:
    expected = whole(Toy(), False)
    for replay in (False, True):
        found = whole(Toy(), replay, workers)
        for left, right in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
            assert torch.equal(left, right)


def test_replayed_passes_keep_nothing_between_sites() -> None:
    layers = {path: Toy().get_submodule(path) for site in SITES for path in site.readers}
    with walk_over(Toy(), True, batches()) as walk:
        for site in SITES:
            for pass_ in walk.arrivals(site.name):
                assert pass_.x is not None
                pass_.prepared = Prepared(site.name, quantize_input(pass_.x, ActivationFormat(bits=8)))
            assert [(pass_.x, pass_.prepared) for pass_ in walk.passes] == [(None, None)] * 3
            walk.settle(site.name, reader_of(layers))
        list(walk.outputs())


@MODES
@pytest.mark.parametrize("workers", [1, 2])
def test_each_pass_is_seen_by_the_worker_that_brought_it(replay: bool, workers: int) -> None:
    layers = {path: Toy().get_submodule(path) for site in SITES for path in site.readers}
    came: dict[str, list[tuple[Pass, int]]] = {site.name: [] for site in SITES}
    with walk_over(Toy(), replay, batches(4), workers=workers) as walk:
        for site in SITES:
            seen = came[site.name]
            for pass_ in walk.arrivals(site.name, lambda pass_, seen=seen: seen.append((pass_, get_ident()))):
                assert pass_.x is not None
            walk.settle(site.name, reader_of(layers))
        list(walk.outputs())
        threads = [{id(pass_): thread for pass_, thread in seen} for seen in came.values()]
    assert threads[0] == threads[1]
    assert len(threads[0]) == 4
    assert len(set(threads[0].values())) == workers


def test_suspended_runs_once_and_replayed_once_a_site() -> None:
    counts = []
    for replay in (False, True):
        block = Toy()
        whole(block, replay)
        counts.append(block.runs)
    assert counts == [3, 9]


@MODES
def test_the_block_has_its_layers_back(replay: bool) -> None:
    block = Toy()
    before = dict(block.named_modules())
    whole(block, replay)
    assert dict(block.named_modules()) == before


@MODES
def test_sites_in_another_order_than_the_block_runs_them(replay: bool) -> None:
    block = Toy()
    with pytest.raises(PlanishError, match="came to site in while out was next"), walk_over(block, replay, batches(), SITES[::-1]) as walk:
        list(walk.arrivals("out"))
    assert isinstance(block.a, nn.Linear)
    assert isinstance(block.c, nn.Linear)


@MODES
def test_outputs_before_all_sites_are_settled(replay: bool) -> None:
    with pytest.raises(PlanishError, match="came to site in while its end was next"), walk_over(Toy(), replay, batches()) as walk:
        list(walk.outputs())


@MODES
def test_a_site_that_the_block_never_comes_to(replay: bool) -> None:
    block = Toy()
    block.spare = nn.Linear(6, 6)
    sites = (*SITES, Site(name="spare", readers=("spare",)))
    layers = {path: block.get_submodule(path) for site in sites for path in site.readers}
    with walk_over(block, replay, batches(), sites) as walk:
        for site in SITES:
            list(walk.arrivals(site.name))
            walk.settle(site.name, reader_of(layers))
        with pytest.raises(PlanishError, match="came to its end while site spare was next"):
            list(walk.arrivals("spare"))
    assert isinstance(block.spare, nn.Linear)


@MODES
@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_errors_inside_a_pass_come_out(replay: bool, run: int, workers: int) -> None:
    block = Toy()
    block.fail_at = run
    passes: list[Pass] = []
    with walk_over(block, replay, batches(), workers=workers) as walk:
        passes += walk.passes
        with pytest.raises(ZeroDivisionError, match="inside the block"):
            list(walk.arrivals("in"))
    assert isinstance(block.get_submodule("deep.b"), nn.Linear)
    assert all(pass_.thread is None or pass_.thread.dead for pass_ in passes)


@MODES
def test_errors_of_readers_come_out(replay: bool) -> None:
    def reader(path: str, _x: Tensor, _pass: Pass) -> Tensor:
        raise KeyError(path)

    block = Toy()
    with walk_over(block, replay, batches()) as walk:
        list(walk.arrivals("in"))
        walk.settle("in", reader)
        with pytest.raises(KeyError, match="a"):
            list(walk.arrivals("out"))
    assert isinstance(block.a, nn.Linear)


@MODES
@pytest.mark.parametrize("workers", [1, 2])
def test_abandoned_passes_let_go(replay: bool, workers: int) -> None:
    """What waits inside the block is freed when the walk is left, by an error or not, even while somebody keeps the passes."""
    kept: list[Pass] = []
    watched: list[weakref.ref[Tensor]] = []

    def stop() -> None:
        inputs = batches()
        watched.extend(weakref.ref(x) for x in inputs)
        with walk_over(Toy(), replay, inputs, workers=workers) as walk:
            kept.extend(walk.passes)
            list(walk.arrivals("in"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert all(pass_.thread is None or pass_.thread.dead for pass_ in kept)
    kept.clear()
    gc.collect()
    assert [reference() for reference in watched] == [None] * 3


@MODES
@pytest.mark.parametrize("workers", [1, 2])
def test_a_finished_walk_holds_nothing(replay: bool, workers: int) -> None:
    block = Toy()
    layers = {path: block.get_submodule(path) for site in SITES for path in site.readers}
    with walk_over(block, replay, batches(), workers=workers) as walk:
        for site in SITES:
            list(walk.arrivals(site.name))
            walk.settle(site.name, reader_of(layers))
        list(walk.outputs())
        assert all(pass_.output is None and pass_.thread is None and pass_.x is None for pass_ in walk.passes)


def test_two_walks_go_side_by_side() -> None:
    """Passes of two walks are suspended at once and taken on in turns."""
    one, other = Toy(), Toy()
    layers = [{path: block.get_submodule(path) for site in SITES for path in site.readers} for block in (one, other)]
    with walk_over(one, False, batches()) as left, walk_over(other, False, batches()) as right:
        for site in SITES:
            for a, b in zip(left.arrivals(site.name), right.arrivals(site.name), strict=True):
                assert a.x is not None
                assert b.x is not None
                assert torch.equal(a.x, b.x)
            left.settle(site.name, reader_of(layers[0]))
            right.settle(site.name, reader_of(layers[1]))
        for a_out, b_out in zip(left.outputs(), right.outputs(), strict=True):
            assert torch.equal(a_out, b_out)


def test_a_prepared_input_stays_with_its_pass() -> None:
    act = ActivationFormat(bits=8)
    block = Toy()
    found = []

    def reader(_path: str, x_TC: Tensor, pass_: Pass) -> Tensor:
        assert pass_.prepared is not None
        found.append(torch.equal(pass_.prepared.quantized.codes, quantize_input(x_TC, act).codes))
        return x_TC

    with walk_over(block, False, batches()) as walk:
        for site in SITES:
            for pass_ in walk.arrivals(site.name):
                assert pass_.x is not None
                pass_.prepared = Prepared(site.name, quantize_input(pass_.x, act))
            walk.settle(site.name, reader)
        list(walk.outputs())
    assert found == [True] * 9


def test_replaced_restores_even_after_an_error() -> None:
    block = Toy()
    before = block.get_submodule("deep.b")
    stand_in = nn.Identity()
    with pytest.raises(ValueError, match="stop"), replaced(block, {"deep.b": stand_in}):
        raise ValueError("stop" if block.get_submodule("deep.b") is stand_in else "not replaced")
    assert block.get_submodule("deep.b") is before
    put(block, "c", nn.Identity())
    assert isinstance(block.c, nn.Identity)


@torch.no_grad()
def test_site_inputs() -> None:
    block = Toy()
    (x,) = batches(1)
    with site_inputs(block, SITES) as inputs:
        block(x)
        seen = inputs.take()
        with pytest.raises(KeyError):  # they were let go of
            inputs.take()
    assert torch.equal(seen["in"], x.flatten(0, 1))
    assert torch.equal(seen["out"], (torch.tanh(block.a(x)) * block.get_submodule("deep.b")(x)).flatten(0, 1))
    with pytest.raises(ValueError, match="stop"), site_inputs(block, SITES):
        raise ValueError("stop")
    assert not any(module._forward_pre_hooks for module in block.modules())
