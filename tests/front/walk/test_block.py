"""One block's turn: solvers pay, smoothing never hurts, wrong topologies are caught, every way to walk gives the same bits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_compress import outlying, quick, source
from helpers_front import tree
from transformers import PreTrainedConfig

import planish
from planish.calib.blocks.sites import Host, Topology
from planish.calib.blocks.topology import topology
from planish.calib.compressed.stored import open_stored
from planish.calib.walk.runner import BlockRunner, Call
from planish.compressing.compression import packed_linears, streams_of
from planish.eval.verifying.probe import check_probe, read_probe
from planish.planning.preflight import Plan, make_plan
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.recipe.schema import Recipe
from planish.walk.block import BlockCompressor, BlockResult, Streams

W4 = Scheme(weights=WeightFormat(bits=4))
W8A8 = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8))
CALIBRATION = planish.Calibration(samples=8, length=48, batch_size=3)


def recipe(scheme: Scheme, solver: object, steps: tuple[planish.Smooth, ...] = ()) -> Recipe:
    assert isinstance(solver, planish.Rtn | planish.Gptq | planish.Gptaq)
    return Recipe(name="test", calibration=CALIBRATION, scheme=scheme, solver=solver, steps=steps)


def errors(folder: Path, out: Path, how: Recipe) -> list[float]:
    found = [block.error for block in planish.compress(how, folder, out, dtype=torch.float32).blocks]
    return [error for error in found if error is not None]


def test_gptq_beats_rounding_and_clipping_helps(tmp_path: Path) -> None:
    folder = outlying(tmp_path / "model")
    rounding = errors(folder, tmp_path / "rtn", recipe(W4, planish.Rtn()))
    gptq = errors(folder, tmp_path / "gptq", recipe(W4, planish.Gptq()))
    assert len(gptq) == 3
    assert gptq[0] < 0.9 * rounding[0]
    assert gptq[-1] < 0.9 * rounding[-1]


@pytest.mark.usefixtures("pythons_text")
def test_smoothing_pays_where_channels_stick_out(tmp_path: Path) -> None:
    folder = outlying(tmp_path / "model")
    plain = errors(folder, tmp_path / "plain", recipe(W8A8, planish.Rtn()))
    smooth = errors(folder, tmp_path / "smooth", recipe(W8A8, planish.Rtn(), (planish.Smooth(),)))
    assert smooth[0] < 0.8 * plain[0]
    assert smooth[-1] < 0.8 * plain[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_auto_takes_no_strength_that_errs_more_than_none(family: str, tmp_path: Path) -> None:
    folder = source(family, tmp_path / "model")
    result = planish.compress(recipe(W8A8, planish.Gptq(), (planish.Smooth(),)), folder, tmp_path / "out", dtype=torch.float32)
    tried = [(site.strength, site.tried) for block in result.blocks for site in block.sites.values() if site.tried]
    assert len(tried) >= 3 * len(result.blocks)
    for strength, found in tried:
        assert found[str(strength)] == min(found.values()) <= found["None"]


WRONG = {
    "gate_up": Host(kind="norm", module="input_layernorm"),
    "down": Host(kind="rows", module="mlp.gate_proj", index=tuple(range(96))),
    "o": Host(kind="rows", module="self_attn.k_proj", index=tuple(h // 2 * 16 + i for h in range(4) for i in range(16))),
}


@pytest.mark.parametrize("site", WRONG)
def test_a_wrong_host_is_caught_on_the_real_block(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: PreTrainedConfig) -> Topology:
        right = topology(config)
        (block,) = right.kinds
        sites = tuple(replace(s, host=WRONG[site]) if s.name == site else s for s in block.sites)
        return replace(right, kinds=(replace(block, sites=sites),))

    folder = source("llama", tmp_path / "model")
    monkeypatch.setattr("planish.calib.walk.runner.topology", wrong)
    monkeypatch.setattr("planish.planning.preflight._prove", lambda _runner: None)  # which would have caught it earlier
    with pytest.raises(planish.PlanishError, match=rf"smooth at block 0 \(.*{site}.*\): the transformed block is off by"):
        planish.compress(recipe(W8A8, planish.Gptq(), (planish.Smooth(strength=0.7, sites=(f"*.{site}",)),)), folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


SAME_BITS = {
    "gptaq": recipe(W8A8, planish.Gptaq(), (planish.Smooth(strength=0.5),)),
    "gptaq-w4": recipe(W4, planish.Gptaq()),
    "w8a8-static": quick("w8a8-static"),
    "w4a16-g128": quick("w4a16-g128"),
    "rtn": recipe(W8A8, planish.Rtn()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "gptaq"), ("opt-350m", "gptaq-w4"), ("gemma3_text", "w8a8-static"), ("gpt2", "w4a16-g128"), ("phi3", "rtn")],
)
def test_suspended_in_memory_and_replayed_from_disk_end_in_the_same_bytes(family: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = source(family, tmp_path / "model")
    plans = [
        planish.compress(SAME_BITS[name], folder, tmp_path / "memory", dtype=dtype).plan,
        planish.compress(SAME_BITS[name], folder, tmp_path / "disk", dtype=dtype, offload_dir=tmp_path / "streams").plan,
    ]
    assert [plan.replay for plan in plans] == [False, True]
    assert tree(tmp_path / "memory") == tree(tmp_path / "disk")
    assert not tree(tmp_path / "streams")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["gptaq", "w8a8-static"])
def test_two_workers_end_in_the_same_bytes_again(name: str, tmp_path: Path) -> None:
    """Again, replayed from disk, and resumed."""
    folder = source("llama", tmp_path / "model")
    plan = planish.compress(SAME_BITS[name], folder, tmp_path / "one", dtype=torch.bfloat16).plan
    compressor, streams = start(plan)
    assert compressor.workers == 2
    planish.compress(SAME_BITS[name], folder, tmp_path / "two", dtype=torch.bfloat16)
    planish.compress(SAME_BITS[name], folder, tmp_path / "three", dtype=torch.bfloat16, offload_dir=tmp_path / "streams")
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")
    result = compressor.compress(0)
    resumed, other = start(plan)
    resumed.advance(result.record, result.tensors, packed_linears(plan, result.record))
    assert all(torch.equal(a, b) for a, b in zip([*streams.full, *streams.quant], [*other.full, *other.quant], strict=True))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_reload_computes_with_as_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planish.compress(SAME_BITS["rtn"], source("llama", tmp_path / "model"), tmp_path / "out", dtype=torch.bfloat16)
    probe, run, seen = read_probe(tmp_path / "out"), Call.run, set()

    def spy(call: Call, block: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return run(call, block, index, hidden)

    assert probe is not None
    assert probe["threads"] == 1
    monkeypatch.setattr(Call, "run", spy)
    assert check_probe(open_stored(tmp_path / "out"), probe).identical
    assert check_probe(open_stored(tmp_path / "out"), {**probe, "threads": torch.tensor(64)}).ok
    assert seen == {1, 2}


def kept(recipe_: Recipe) -> Recipe:
    return replace(recipe_, overrides=(planish.Override(sites=("*.o", "1.*"), keep=True),))


def start(plan: Plan) -> tuple[BlockCompressor, Streams]:
    runner = BlockRunner(plan.checkpoint, plan.dtype, plan.device)
    with torch.no_grad():
        streams = streams_of(plan, runner, None)
    assert streams is not None
    return BlockCompressor(runner, plan.recipe.solver, plan.recipe.steps, plan.packed, streams), streams


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda r: r, kept], ids=["all", "some-kept"])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "gptaq"), ("opt", "gptaq"), ("gpt2", "gptaq-w4"), ("gemma2", "w8a8-static"), ("gpt_neox", "w4a16-g128"), ("opt-350m", "rtn")],
)
def test_advance_moves_the_streams_as_compress_did(
    family: str, name: str, change: Callable[[Recipe], Recipe], dtype: torch.dtype, tmp_path: Path
) -> None:
    """What resume does: the stored block takes both streams on, to the same bits."""
    folder = source(family, tmp_path / "model")
    plan = make_plan(change(SAME_BITS[name]), folder, dtype=dtype, device="cpu")
    compressor, streams = start(plan)
    resumed, other = start(plan)
    for index in range(plan.topology.block_count):
        result: BlockResult = compressor.compress(index)
        resumed.advance(result.record, result.tensors, packed_linears(plan, result.record))
        for one, two in zip([*streams.full, *streams.quant], [*other.full, *other.quant], strict=True):
            assert torch.equal(one, two)


def test_arithmetic_is_switched_back_after_an_error(tmp_path: Path) -> None:
    plan = make_plan(SAME_BITS["rtn"], source("llama", tmp_path / "model"), dtype=torch.bfloat16)
    compressor, streams = start(plan)
    streams.calls.pop()
    streams.calls[0].extra.clear()
    before = torch.get_float32_matmul_precision()
    with pytest.raises(IndexError):
        compressor.compress(0)
    assert torch.get_float32_matmul_precision() == before
    assert all(parameter.is_meta for parameter in compressor.runner.blocks[0].parameters())
