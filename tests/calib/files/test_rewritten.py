"""Rewritten checkpoints compute what the original does, for every family and step, or are refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_stored import saved
from tiny_models import CONFIGS, RELATIVES, tiny, tokens
from torch import Tensor

from planish.calib.blocks.topology import topology
from planish.calib.files.checkpoint import Checkpoint, open_checkpoint
from planish.calib.files.rewritten import Rewriting, Rewritten
from planish.calib.walk.runner import BlockRunner
from planish.quant.errors import PlanishError
from planish.quant.transforms.factors import Chain, on_input
from planish.quant.transforms.rotate import Kind, mean_keeping, mixing, turned_back

CPU = torch.device("cpu")
POST_NORMS = ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4")
KINDS: tuple[Kind, ...] = ("hadamard", "orthogonal")
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "nine heads": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 52},
    ),
    "width 54, heads of 6": ("qwen2", {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 1, "intermediate_size": 40}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "layer norms of width 36": ("gpt2", {"hidden_size": 36, "num_attention_heads": 6}),
    "layer norms of width 50": ("gpt_neox", {"hidden_size": 50, "num_attention_heads": 5}),
    "no biases behind biased norms": ("opt", {"enable_bias": False}),
    "no attention biases": ("gpt_neox", {"attention_bias": False}),
    "projected embeddings": ("opt", {"word_embed_proj_dim": 32}),
    "no last norm": ("opt", {"_remove_final_layer_norm": True}),
    "query and key norms, tied": ("qwen3", {"tie_word_embeddings": True}),
}


def opened(family: str, folder: Path, changes: dict[str, Any] | None = None) -> Checkpoint:
    return open_checkpoint(saved(tiny(family, changes=changes), folder / "model"))


def residual(checkpoint: Checkpoint, kind: Kind = "hadamard", seed: int = 0) -> Chain:
    make = mean_keeping if topology(checkpoint.config).norm_kind == "layer" else mixing
    return make(checkpoint.config.hidden_size, kind, seed)


def value(checkpoint: Checkpoint, kind: Kind = "hadamard") -> Chain:
    known = topology(checkpoint.config)
    return mixing(len(known.block(1).site("o").makers[0].index) // known.heads, kind, 0)


@torch.no_grad()
def run(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The stream that enters the first block, and the logits."""
    runner = BlockRunner(checkpoint, torch.float32, CPU)
    ((first, call),) = runner.start([tokens()])
    hidden = first
    for index in range(runner.topology.block_count):
        hidden = call.run(runner.load_block(index), index, hidden)
        runner.release_block(index)
    with runner.head() as head:
        return first, torch.stack([torch.cat(list(head.logits(hidden_LD))) for hidden_LD in hidden])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_same(checkpoint: Checkpoint, rewriting: Rewriting) -> None:
    rewritten = Rewritten.of(checkpoint, rewriting)
    (stream, expected), (other, found) = run(checkpoint), run(rewritten)
    assert error(found, expected) < 1e-5
    assert error(other, rewritten.stream_map(stream)) < 1e-6
    if rewriting.residual:
        assert error(other, stream) > 0.5
        back = rewritten.original_stream(other)
        if rewritten.stream_map.center:
            stream = stream - stream.mean(-1, keepdim=True)
        assert error(back, stream) < 1e-5


@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_folded_norms(family: str, tmp_path: Path) -> None:
    checkpoint = opened(family, tmp_path)
    if family == "opt-350m":
        with pytest.raises(PlanishError, match="fold_norms: the residual stream itself is normalised"):
            Rewritten.of(checkpoint, Rewriting(fold=True))
        return
    check_same(checkpoint, Rewriting(fold=True))
    rewritten = Rewritten.of(checkpoint, Rewriting(fold=True))
    assert not rewritten.tied
    assert not rewritten.config.tie_word_embeddings
    known = topology(checkpoint.config)
    for site in known.block(0).sites:
        if site.host is not None and site.host.kind == "norm":
            block = BlockRunner(rewritten, torch.float32, CPU).load_block(1)
            weight = block.get_submodule(site.host.module).weight
            assert torch.equal(weight, torch.full_like(weight, 1 - known.norm_offset))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_a_rotated_stream(family: str, kind: Kind, tmp_path: Path) -> None:
    checkpoint = opened(family, tmp_path)
    rewriting = Rewriting(fold=True, residual=residual(checkpoint, kind))
    if family in (*POST_NORMS, "opt-350m"):
        reason = "norms stand behind the layers that write" if family in POST_NORMS else "the residual stream itself is normalised"
        with pytest.raises(PlanishError, match=reason):
            Rewritten.of(checkpoint, rewriting)
        return
    check_same(checkpoint, rewriting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_rotated_heads(family: str, kind: Kind, tmp_path: Path) -> None:
    checkpoint = opened(family, tmp_path)
    rewritten = Rewriting(value=value(checkpoint, kind))
    check_same(checkpoint, rewritten)
    assert Rewritten.of(checkpoint, rewritten).tied == checkpoint.tied
    before, after = (BlockRunner(c, torch.float32, CPU).load_block(1) for c in (checkpoint, Rewritten.of(checkpoint, rewritten)))
    (path,) = topology(checkpoint.config).block(1).site("o").readers
    turned = error(after.get_submodule(path).weight, before.get_submodule(path).weight)  # type: ignore[arg-type]
    assert turned == 0 if family.startswith("qwen3_5") else turned > 0.5  # a gate stands before it, with which no rotation commutes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ODD)
def test_all_at_once_in_odd_models(case: str, kind: Kind, tmp_path: Path) -> None:
    family, changes = ODD[case]
    checkpoint = opened(family, tmp_path, changes)
    check_same(checkpoint, Rewriting(fold=True, residual=residual(checkpoint, kind, seed=3), value=value(checkpoint, kind)))


def test_untied_alone(tmp_path: Path) -> None:
    checkpoint = opened("llama", tmp_path)
    rewritten = Rewritten.of(checkpoint, Rewriting(untie=True))
    assert checkpoint.tied
    assert not rewritten.tied
    assert rewritten.nbytes == checkpoint.nbytes + checkpoint.info("lm_head.weight").nbytes
    assert error(run(rewritten)[1], run(checkpoint)[1]) < 1e-6


def test_projected_embeddings_stay_tied(tmp_path: Path) -> None:
    checkpoint = opened("opt", tmp_path, {"word_embed_proj_dim": 32})
    assert Rewritten.of(checkpoint, Rewriting(fold=True, residual=residual(checkpoint))).tied == checkpoint.tied


def test_a_bias_with_nowhere_to_go(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    with torch.no_grad():
        model.get_submodule("gpt_neox.final_layer_norm").weight[3] = 0  # type: ignore[operator,index]
    checkpoint = open_checkpoint(saved(model, tmp_path / "model"))
    with pytest.raises(PlanishError, match=r"gpt_neox.final_layer_norm: its weight is 0 in 1 channels where its bias is not"):
        Rewritten.of(checkpoint, Rewriting(fold=True))


def test_outside_the_blocks_weights_are_as_they_will_be_stored(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    checkpoint = open_checkpoint(saved(model, tmp_path / "model"))
    rewriting = Rewriting(fold=True, residual=residual(checkpoint))
    rewritten, exact = Rewritten.of(checkpoint, rewriting), Rewritten.of(checkpoint, rewriting, exact=True)
    for name in ("model.embed_tokens", "lm_head"):
        loaded = []
        for source in (rewritten, exact):
            module = source.skeleton().get_submodule(name)
            source.load_module(module, name, dtype=torch.float32)
            loaded.append(module.weight)
        rounded, whole = loaded
        assert isinstance(rounded, Tensor)
        assert isinstance(whole, Tensor)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert not torch.equal(whole, rounded)
        assert error(rounded, whole) < 4e-3


def test_the_blocks_stay_as_exact_as_they_are_wanted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tiny("llama").to(torch.bfloat16), tmp_path / "model"))
    rewritten = Rewritten.of(checkpoint, Rewriting(fold=True, residual=residual(checkpoint)))
    plain, turned = (BlockRunner(c, torch.float32, CPU).load_block(0) for c in (checkpoint, rewritten))
    q_OD, gain_D = plain.get_submodule("self_attn.q_proj").weight, plain.get_submodule("input_layernorm").weight
    assert isinstance(q_OD, Tensor)
    assert isinstance(gain_D, Tensor)
    found = turned.get_submodule("self_attn.q_proj").weight
    assert isinstance(found, Tensor)
    assert error(found, on_input(rewritten.rewriting.residual, q_OD.double() * gain_D.double())) < 1e-6
    assert error(turned_back(rewritten.rewriting.residual, found), q_OD * gain_D) < 1e-6
