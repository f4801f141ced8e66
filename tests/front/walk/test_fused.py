"""Fused steps in recipes: the checkpoint stays portable and computes the same, or the recipe is refused with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from helpers_front import tree
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, FAMILIES, MIXTURES
from torch import nn

import planish
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.score import score
from planish.recipe.schema import with_settings

STREAM = "fold_norms, rotate: {at: residual}"
ROTATED = f"{STREAM}, rotate: {{at: value}}"
FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver.gptaq.alpha=0")  # so that a wrong transform shows
NO_R1 = ("gemma2", "gemma3_text", "olmo2", "opt-350m")
VARIANTS = {
    "all": f"{STREAM}, scale_rms: {{sites: ['*.o', '*.down']}}, permute: {{block: 8}}, rotate: {{at: value}}, rotate: {{at: heads}}, hadamard, clip",
    "scales": "scale_rms: {exponent: 0.5}",
    "searched": "scale_rms",
    "heads": "rotate: {at: value, kind: orthogonal}, rotate: {at: heads, kind: orthogonal}",
    "order": "rotate: {at: value}, permute: {block: 4}, hadamard: {block: 4, sites: ['*.o', '*.down']}",
    "prefix": f"prefix: {{tokens: [5]}}, {STREAM}",
    "smooth": f"untie, {STREAM}, smooth: {{sites: '*.down'}}",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fused")
    return {family: source(family, root / family) for family in CONFIGS}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "planish" / "manifest.json").read_text(encoding="utf-8"))


@torch.no_grad()
def far(out: Path, model: Path) -> float:
    """How far the compressed model's logits are from the original's."""
    found, base = planish.load(out, dtype=torch.float32)(ids()).logits, planish.load(model, dtype=torch.float32)(ids()).logits
    return distance(found, base)


def near(family: str) -> float:
    """How far eight bits may take it: a token that they send to another expert of random ones is another token."""
    return 0.12 if family in MIXTURES else 0.06


@pytest.mark.parametrize("family", CONFIGS)
def test_rotated_in_eight_bits_and_run_by_stock_transformers(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    chosen = "rotate: {at: value}" if family == "opt-350m" else "fold_norms, rotate: {at: value}" if family in NO_R1 else ROTATED
    out = tmp_path / "out"
    result = planish.compress(quick("w8a8", f"steps=[{chosen}]"), sources[family], out, dtype=torch.float32)
    assert far(out, sources[family]) < near(family)
    assert not result.plan.recipe.extended
    assert "planish" not in config(out)
    tied = family == "opt-350m" or (CONFIGS[family].get("tie_word_embeddings", False) and "fold_norms" not in chosen)
    assert config(out)["tie_word_embeddings"] == tied
    assert ("the head gets weights of its own" in " ".join(result.plan.notes)) == (open_checkpoint(sources[family]).tied and not tied)
    errors = manifest(out)["fused"]["errors"]
    assert set(errors) == {"embeddings", "head", *(result.plan.topology.block_name(i) for i in (0, result.plan.topology.block_count - 1))}
    assert max(errors.values()) < 1e-5
    checks = planish.verify(out, sources[family], windows=2, length=64)
    assert checks.ok
    assert checks["probe"].ok
    assert checks["transformers"].ok or family == "gpt2"


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    """compress itself refuses where the reloaded checkpoint differs from the model in memory."""
    for family in ("qwen2", "phi3", "gpt_neox-serial") if variant != "smooth" else ("llama",):
        model = source(family, tmp_path / family, torch.float32)
        out = tmp_path / f"{family}-out"
        result = planish.compress(quick("w4a4-best", f"steps=[{VARIANTS[variant]}]", *FINE), model, out)
        assert max(block.equivalence for block in result.blocks) < 1e-4
        found, base = score(open_stored(out), ids()), score(open_checkpoint(model), ids())
        assert abs(found.nll - base.nll) < 0.1
        assert ("planish" in config(out)) == (variant not in ("scales", "searched", "smooth"))


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_orders_of_every_family(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = quick("w8a8", "steps=[scale_rms: {exponent: 0.7}, permute: {block: 4}, rotate: {at: value}]")
    result = planish.compress(recipe, sources[family], tmp_path / "out", dtype=torch.float32)
    assert 0 < max(block.equivalence for block in result.blocks) < 1e-4
    assert far(tmp_path / "out", sources[family]) < near(family)


def test_auto_takes_the_best_exponent(tmp_path: Path) -> None:
    result = planish.compress(quick("w4a4-best", "steps=[scale_rms, hadamard]"), source("llama", tmp_path / "model"), tmp_path / "out")
    tried = [(site.exponent, site.tried) for block in result.blocks for site in block.sites.values()]
    assert len(tried) == 4 * 3
    for exponent, errors in tried:
        assert set(errors) == {"None", "0.25", "0.5", "0.75", "1.0"}
        assert errors[str(exponent)] == min(errors.values())
    assert len({exponent for exponent, _ in tried}) > 1


def test_without_text(tmp_path: Path) -> None:
    model = source("llama-biased", tmp_path / "model", torch.float32)
    settings = (f"steps=[{ROTATED}]", "calibration=null", "solver=rtn")
    planish.compress(with_settings(planish.load_recipe("w8a8"), settings), model, tmp_path / "out")
    assert far(tmp_path / "out", model) < 0.06
    assert manifest(tmp_path / "out")["fused"]["errors"]["head"] < 1e-5


def test_static_scales_see_rotated_inputs(tmp_path: Path) -> None:
    model = source("llama", tmp_path / "model", torch.float32)
    planish.compress(quick("w8a8-static", f"steps=[{ROTATED}]"), model, tmp_path / "out")
    assert far(tmp_path / "out", model) < 0.1


def test_the_draw_with_the_least_range(tmp_path: Path) -> None:
    steps = "steps=[fold_norms, rotate: {at: residual, seeds: 4}]"
    model = source("llama", tmp_path / "model")
    planish.compress(quick("w8a8", steps), model, tmp_path / "out")
    found = manifest(tmp_path / "out")["fused"]
    assert len(set(found["ranges"])) == 4
    assert found["ranges"][found["draw"]] == min(found["ranges"])
    planish.compress(quick("w8a8", steps), model, tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


@pytest.mark.parametrize("steps", [ROTATED.replace("residual", "residual, seeds: 2"), VARIANTS["all"]])
def test_a_run_that_is_taken_up_again_ends_in_the_same_bytes(steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = source("qwen2", tmp_path / "model"), quick("w4a4-best", f"steps=[{steps}]")
    planish.compress(recipe, model, tmp_path / "whole", dtype=torch.bfloat16)

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(recipe, model, tmp_path / "out", dtype=torch.bfloat16)
    assert (tmp_path / "out.partial").is_dir()
    planish.compress(recipe, model, tmp_path / "out", dtype=torch.bfloat16)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_shards_hold_the_head_of_its_own(tmp_path: Path) -> None:
    model = source("llama", tmp_path / "model")
    planish.compress(quick("w8a8", "steps=[untie]"), model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["lm_head.weight"], load_file(model / "model.safetensors")["model.embed_tokens.weight"])
    result = planish.plan(quick("w8a8", "steps=[untie]"), source("mistral", tmp_path / "untied"))
    assert result.notes[0] == "untie: the head has weights of its own already."


REFUSED = {
    "rotate: {at: residual}": "rotate at residual needs norms that multiply by 1.* Put fold_norms before it",
    "rotate: {at: residual}, fold_norms": "Put fold_norms before it",
    "smooth, fold_norms": "fold_norms comes after smooth, but it rewrites the whole model",
    "fold_norms, fold_norms": "fold_norms is given twice",
    "rotate: {at: value}, rotate: {at: value, kind: orthogonal}": "rotate at value is given twice",
    "rotate: {at: value, seeds: 3}": "only at residual are draws compared",
    "fold_norms, rotate: {at: residual, seeds: 0}": "rotate.seeds is 0|seeds is 0",
    f"{STREAM}, scale_rms": r'the sites qkv, gate_up read the residual stream, .* Give sites: \["\*.o", "\*.down"\]',
    "rotate: {at: value}, scale_rms: {sites: '*.o'}": "Put scale_rms before it",
    "scale_rms: {exponent: 2}": r"exponent is 2.*, but it lies in \[0, 1\]",
    "scale_rms, smooth": "scale_rms and smooth both scale site 0.qkv",
    "permute: {sites: '*.qkv'}": "the order of the channels of qkv is the residual stream's",
    "permute: {block: 0}": "block is 0, but a block has at least 1 channel",
    "scale_rms: {sites: '*.o'}, rotate: {at: value}, permute: {sites: '*.o'}": "Put permute before rotate",
}


@pytest.mark.parametrize("steps", REFUSED)
def test_refused(steps: str, sources: dict[str, Path]) -> None:
    with pytest.raises(planish.PlanishError, match=REFUSED[steps]):
        planish.plan(quick("w8a8", f"steps=[{steps}]"), sources["llama"])


def test_refused_for_this_model(sources: dict[str, Path], tmp_path: Path) -> None:
    odd = source("llama", tmp_path / "odd", changes={"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3})
    cases: list[tuple[str, Path, str]] = [
        ("rotate: {at: heads}", odd, "the model has 9 heads, and there is no Hadamard matrix of that order. Use kind: orthogonal"),
        (STREAM, sources["gemma2"], r"gemma2: rotate at residual: norms stand behind .* \(post_attention_layernorm, post_feedforward_layernorm\)"),
        ("fold_norms", sources["opt-350m"], "opt: fold_norms: the residual stream itself is normalised"),
        (
            "scale_rms: {sites: '*.down'}",
            sources["gpt2"],
            r"can take a scale for free in this model. Sites that can: qkv, o, up",
        ),
    ]
    for steps, model, message in cases:
        with pytest.raises(planish.PlanishError, match=message):
            planish.plan(quick("w8a8", f"steps=[{steps}]"), model)


def test_steps_that_look_at_text_need_some(sources: dict[str, Path]) -> None:
    for steps, name in ((STREAM.replace("residual", "residual, seeds: 2"), "rotate at residual"), ("hadamard", "hadamard"), ("permute", "permute")):
        with pytest.raises(planish.PlanishError, match=f"calibration is null, but the step {name} cannot do without"):
            quick("w8a8", f"steps=[{steps}]", "calibration=null", "solver=rtn")


def test_a_static_range_that_would_come_too_late(sources: dict[str, Path]) -> None:
    with pytest.raises(planish.PlanishError, match=r"site 0.o has a static activation scale, .* Put rotate first"):
        planish.plan(quick("w8a8-static", "steps=[scale_rms, rotate: {at: value}]"), sources["llama"])


def nothing(*_args: object) -> None:
    """Where something should be done."""


def halved(module: nn.Module, *_args: object) -> None:
    for parameter in module.parameters():
        parameter.mul_(0.5)


def spoiled(module: nn.Module, *_args: object) -> None:
    for parameter in module.parameters():
        parameter.mul_(torch.nan)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("map_stream", nothing, r"rotate at residual: model.layers.0, the residual stream: .* off by"),
        ("fold_norms", halved, r"fold_norms: model.layers.0, the residual stream: .* off by"),
        ("fold_norms", spoiled, r"fold_norms: model.layers.0, the residual stream: .* off by nan"),
        ("rotate_values", halved, r"rotate at value: model.layers.0, site o: .* off by"),
        ("write_through", nothing, r"rotate at residual: embeddings, the residual stream: .* off by"),
        ("read_through", nothing, r"rotate at residual: head, the residual stream: .* off by"),
    ],
)
def test_wrong_weights_are_caught_at_run_time(
    name: str, wrong: Callable[..., None], message: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"planish.calib.files.rewritten.{name}", wrong)
    with pytest.raises(planish.PlanishError, match=message):
        planish.compress(quick("w8a8", f"steps=[{ROTATED}]"), sources["llama"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_heads_in_a_blocks_turn_are_caught(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.walk.blocksteps.rotate_values", halved)
    with pytest.raises(planish.PlanishError, match=r"scale_rms, rotate at value at block 0 \(.*o.*\): the transformed block is off by"):
        planish.compress(quick("w8a8", "steps=[scale_rms: {exponent: 0.5}, rotate: {at: value}]"), sources["llama"], tmp_path / "out")


def test_rotation_flattens_what_is_quantized(tmp_path: Path) -> None:
    """A stream with outlying channels: four bits lose less behind R1."""
    model = source("mistral", tmp_path / "model", torch.float32)
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, ::16] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    plain = planish.compress(quick("w4a4-best", "steps=[]"), model, tmp_path / "plain").blocks
    rotated = planish.compress(quick("w4a4-best", f"steps=[{ROTATED}]"), model, tmp_path / "rotated").blocks
    assert plain[0].error is not None
    assert rotated[0].error is not None
    assert rotated[0].error < 0.8 * plain[0].error


LEARNED = "rotate: {at: residual, kind: learned, steps: 30, tokens: 512}"
OWN = "rotate: {at: value, kind: learned, steps: 10, tokens: 256}"


def test_a_learned_rotation_lessens_the_range_and_nothing_else(sources: dict[str, Path], tmp_path: Path) -> None:
    learned = f"steps=[fold_norms, {LEARNED}, {OWN}]"
    result = planish.compress(quick("w8a8", learned), sources["qwen2"], tmp_path / "out", dtype=torch.float32)
    assert not result.plan.recipe.extended
    assert far(tmp_path / "out", sources["qwen2"]) < 0.06
    found = manifest(tmp_path / "out")["fused"]
    assert set(found["learned"]) == {"residual", *(f"value {index}" for index in range(result.plan.topology.block_count))}
    assert all(after < 0.95 * before for before, after in found["learned"].values())
    assert max(found["errors"].values()) < 1e-5
    with pytest.raises(planish.PlanishError, match="a LayerNorm"):
        planish.plan(quick("w8a8", f"steps=[fold_norms, {LEARNED}]"), sources["gpt_neox"])


@pytest.mark.parametrize("family", CONFIGS)
def test_values_learn_rotations_of_their_own_in_every_family(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Grouped queries, one key-value head, fused and interleaved projections, biases."""
    planish.compress(quick("w8a8", f"steps=[{OWN}]"), sources[family], tmp_path / "out", dtype=torch.float32)
    assert far(tmp_path / "out", sources[family]) < near(family)
    found = manifest(tmp_path / "out")["fused"]
    assert all(after < before for before, after in found["learned"].values())
    assert max(found["errors"].values()) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (5, 1), (7, 7)])
def test_values_learn_with_odd_head_counts(heads: int, kv_heads: int, tmp_path: Path) -> None:
    changes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = source("llama", tmp_path / "model", torch.float32, changes)
    planish.compress(quick("w8a8", f"steps=[fold_norms, {LEARNED}, {OWN}]"), model, tmp_path / "out")
    assert far(tmp_path / "out", model) < 0.06
    assert all(after <= before for before, after in manifest(tmp_path / "out")["fused"]["learned"].values())


def test_learning_twice_gives_the_same_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        planish.compress(quick("w4a4-portable-mixed", f"steps=[fold_norms, {LEARNED}, {OWN}]"), sources["qwen2"], tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_an_objective_of_its_own(sources: dict[str, Path], tmp_path: Path) -> None:
    """Each lessens itself; they are different numbers."""
    seen = set()
    for objective in ("range", "kurtosis", "whip"):
        step = LEARNED.replace("steps: 30", f"steps: 30, objective: {objective}")
        planish.compress(quick("w8a8", f"steps=[fold_norms, {step}]"), sources["llama"], tmp_path / objective)
        before, after = manifest(tmp_path / objective)["fused"]["learned"]["residual"]
        assert after < before
        seen.add(before)
    assert len(seen) == 3


MISTAKEN = {
    "rotate: {at: value, kind: learned, seeds: 2}": "one draw at residual or value",
    "rotate: {at: heads, kind: learned}": "one draw at residual or value",
    "rotate: {at: value, steps: 50}": "rotate.steps is 50, but a rotation of kind hadamard has none. Set kind: learned",
    "rotate: {at: value, kind: orthogonal, objective: whip}": "objective is whip, but a rotation of kind orthogonal has none",
    "rotate: {at: value, kind: learned, steps: 0}": "rotate.steps is 0, but must be at least 1",
    "rotate: {at: value, kind: learned, tokens: -1}": "rotate.tokens is -1, but must be at least 1",
    "rotate: {at: value, kind: learned, objective: peak}": "objective: expected 'range' or 'kurtosis' or 'whip' or null, got 'peak'",
}


@pytest.mark.parametrize("step", MISTAKEN)
def test_mistaken_settings_of_learning(step: str) -> None:
    with pytest.raises(planish.PlanishError, match=MISTAKEN[step]):
        quick("w8a8", f"steps=[{step}]")


def test_values_are_learned_before_anything_is_scaled(sources: dict[str, Path]) -> None:
    with pytest.raises(planish.PlanishError, match=r"learned from o's input as the model has it, .* Put rotate first"):
        planish.plan(quick("w8a8", f"steps=[scale_rms: {{sites: '*.o'}}, {OWN}]"), sources["llama"])
