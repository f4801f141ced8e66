"""Attention-aware rounding in a block's turn: what it takes for queries, keys, RoPE, masks and prefix against the model's own attention; refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import ids, source
from torch import Tensor

import planish
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.calib.walk.site_walk import Pass, walking
from planish.compressing.compression import streams_of
from planish.planning.preflight import make_plan
from planish.quant.formats import Scheme, WeightFormat
from planish.quant.solvers.attention import Heads, softmax_metrics
from planish.quant.transforms import Cat, Prefix
from planish.recipe.schema import Recipe
from planish.walk import solving
from planish.walk.attention import heads_of
from planish.walk.block import BlockCompressor
from planish.walk.solving import Readers

W4 = Scheme(weights=WeightFormat(bits=4))
CALIBRATION = planish.Calibration(samples=8, length=48, batch_size=3)
COVERED = ["llama", "llama-biased", "mistral", "qwen2", "phi3", "gpt2", "opt", "opt-350m", "gpt_neox"]


def recipe(**settings: Any) -> Recipe:
    return Recipe(name="test", calibration=CALIBRATION, scheme=W4, solver=planish.Gptaq(attention=True, order="diagonal"), **settings)


def probabilities(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scaling: float, before_PKD: Tensor | None, seen: Tensor) -> Tensor:
    """(N, T, P + T), pair of channels by pair of channels."""

    def turned(x_TND: Tensor) -> Tensor:
        y, half = x_TND.clone(), cos_TD.shape[1] // 2
        for c in range(half):
            y[..., c] = x_TND[..., c] * cos_TD[:, c, None] - x_TND[..., c + half] * sin_TD[:, c, None]
            y[..., c + half] = x_TND[..., c + half] * cos_TD[:, c, None] + x_TND[..., c] * sin_TD[:, c, None]
        return y

    q, k = turned(q_TND), turned(k_TKD)
    k = k if before_PKD is None else torch.cat([before_PKD, k])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (scaling * torch.einsum("ind,jnd->nij", q, k)).masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.mark.parametrize("prefix", [(), (5, 9)], ids=["alone", "prefix"])
@pytest.mark.parametrize("family", COVERED)
@torch.no_grad()
def test_sees_what_the_models_attention_sees(family: str, prefix: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probabilities that follow from what softmax_metrics is told are those that the model's own code makes."""
    runner = BlockRunner(open_checkpoint(source(family, tmp_path / "model", torch.float32)), torch.float32, torch.device("cpu"))
    stream = runner.lay_prefix(prefix) if prefix else None
    ((hidden, call),) = runner.start([ids(2, 20)])
    for index in range(2):
        block = runner.load_block(index)
        if stream is not None:
            stream.advance(block, index)
        told: list[tuple[Any, ...]] = []

        def spy(*given: Any, before_PKD: Tensor | None, seen_TS: Tensor | None, every: int, told: list[Any] = told) -> tuple[Tensor, Tensor]:
            told.append((*given, before_PKD, seen_TS))
            return softmax_metrics(*given, before_PKD=before_PKD, seen_TS=seen_TS, every=every)

        monkeypatch.setattr("planish.walk.attention.softmax_metrics", spy)
        known = runner.topology.attention
        assert known is not None
        site = next(site for site in runner.topology.block(0).sites if site.name == "qkv")
        plain = Readers.of(block, site, None, None, torch.float32)
        before_PKD = None if runner.prefix is None else runner.prefix.tensors(index)["key"][0].transpose(0, 1)
        attention = block.get_submodule(known.module)
        scaling = attention.scaling
        assert isinstance(scaling, float)
        with walking(block, [site], [Pass(lambda: call.run(block, index, hidden))], replay=True) as walk:  # noqa: B023 - run at once
            heads = heads_of(plain, known, walk, scaling, [call.arguments(block, index)], before_PKD)
        assert heads.metric_NDD.shape == (len(heads.rows_ND), known.size, known.size)
        seen: list[Tensor] = []
        hook = attention.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output[1]))
        before, runner.model.config._attn_implementation = runner.model.config._attn_implementation, "eager"
        arguments = call.arguments(block, index)
        mask = arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
        eager = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        args, kwargs = call.extra[index]
        args = tuple(eager if i == 1 else given for i, given in enumerate(args))
        block(hidden, *args, **(kwargs if args else {**kwargs, "attention_mask": eager}))
        runner.model.config._attn_implementation = before
        hook.remove()
        for b, (q, k, cos, sin, factor, keys, some) in enumerate(told):
            some = torch.ones(20, 20, dtype=torch.bool).tril() if some is None else some
            torch.testing.assert_close(probabilities(q, k, cos, sin, factor, keys, some), seen[0][b], rtol=1e-4, atol=1e-6)
        assert len(told) == 2
        hidden = call.run(block, index, hidden)
        runner.release_block(index)


@pytest.mark.parametrize("steps", [(), (Prefix(tokens=("bos",)), Cat(block=32))], ids=["plain", "prefix-cat"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_scores_keep_more_than_by_the_usual_solver(family: str, steps: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed and reloaded; the error that the softmax sees of q and k in every block, tr(G dW H dW'), is below the usual solver's."""
    errors: list[tuple[float, float]] = []
    among: Callable[..., Any] = solving.solve_among

    def spy(w_OI: Tensor, fmt: WeightFormat, moments: Any, heads: Heads, solver: Any, dtype: torch.dtype) -> Any:
        aware = among(w_OI, fmt, moments, heads, solver, dtype)
        usual = replace(solver, attention=False).solve(w_OI, fmt, moments, dtype)
        errors.append((score_error(w_OI, aware, moments, heads), score_error(w_OI, usual, moments, heads)))
        return aware

    monkeypatch.setattr(solving, "solve_among", spy)
    how = replace(recipe(steps=steps), solver=planish.Gptq(attention=True))
    result = planish.compress(how, source(family, tmp_path / "model"), tmp_path / "out")
    assert len(errors) == len(result.blocks)
    assert all(aware < usual for aware, usual in errors)
    assert sum(aware for aware, _ in errors) < 0.95 * sum(usual for _, usual in errors)


def score_error(w_OI: Tensor, solution: Any, moments: Any, heads: Heads) -> float:
    d_NDI = (w_OI - solution.weight.dequantize())[heads.rows_ND]
    return float((heads.metric_NDD.float() @ d_NDI @ moments.second_II * d_NDI).sum())


def test_searched_settings_and_attention_together(tmp_path: Path) -> None:
    solver = planish.Gptaq(attention=True, alpha=(0.0, 0.5))
    result = planish.compress(replace(recipe(), solver=solver), source("qwen2", tmp_path / "model"), tmp_path / "out", dtype=torch.float32)
    assert all(set(site.settings) == {"alpha"} for block in result.blocks for site in block.sites.values())


REFUSED = {
    "norms of queries and keys": ("qwen3", {}),
    "a cap on the scores": ("gemma2", {}),
    "granularity is tensor": ("llama", {"scheme": Scheme(weights=WeightFormat(bits=4, granularity="tensor"))}),
    "no site qkv is quantized": ("llama", {"overrides": (planish.Override(sites=("*.qkv",), keep=True),)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str, tmp_path: Path) -> None:
    family, changes = REFUSED[message]
    with pytest.raises(planish.PlanishError, match=message):
        make_plan(replace(recipe(), **changes), source(family, tmp_path / "model"))


def test_the_same_bytes_from_disk(tmp_path: Path) -> None:
    """Replayed from disk as suspended in memory."""
    folder = source("llama", tmp_path / "model")
    plans = [make_plan(recipe(), folder, dtype=torch.float32, offload_dir=where) for where in (None, tmp_path / "streams")]
    tensors = []
    for plan in plans:
        runner = BlockRunner(plan.source, plan.dtype, plan.device)
        with torch.no_grad():
            streams = streams_of(plan, runner, plan.offload_dir)
        compressor = BlockCompressor(runner, plan.recipe.solver, plan.recipe.steps, plan.packed, streams)
        tensors.append(compressor.compress(0).tensors)
    assert [plan.replay for plan in plans] == [False, True]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
