"""Steps that transform inputs at run time, clips and the prefix: through the whole compression, for every family."""

import json
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import merge, rewrite
from helpers_compress import distance, ids, quick, source
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

import planish
from planish.calib.compressed.layout import read_layout
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.eval.scores.score import final_hidden, score
from planish.eval.verifying.stock import by_itself
from planish.eval.verifying.structure import check_structure
from planish.quant.errors import PlanishError

STEPS = {
    "cat": "[cat: {block: 16}]",
    "cat-odd": "[cat: {block: 12, hadamard: false}]",
    "wush": "[wush: {block: 16}]",
    "hadamard": "[hadamard: {seeds: 2}]",
    "duquant": "[duquant: {block: 16, steps: 8}]",
    "shift": "[shift, hadamard]",
    "flat": "[flat: {steps: 4}]",
    "flat-blocks": "[flat: {structure: blocks, block: 16, steps: 4, start: hadamard}, clip]",
    "middle": "[shift: {by: middle}]",
    "auto": "[auto]",
    "auto-among-others": "[shift, auto: {candidates: [[hadamard], [cat: {block: 16}]], margin: 0.0}, hadamard: {block: 8}, clip]",
    "all": "[prefix: {tokens: [5]}, shift, duquant: {block: 16, steps: 4}, cat: {block: 16}, flat: {steps: 2}, clip]",
}
FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver.gptaq.alpha=0")  # so that a wrong transform shows


def compressed(family: str, steps: str, folder: Path, *settings: str) -> Path:
    model = source(family, folder / "model", torch.float32)
    planish.compress(quick("w4a4-best", f"steps={steps}", *settings), model, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_with_all_steps(family: str, tmp_path: Path) -> None:
    """compress itself refuses where the reloaded checkpoint differs from the model in memory."""
    out = compressed(family, STEPS["all"], tmp_path, *FINE)
    base, found = (score(opened, ids()) for opened in (open_checkpoint(tmp_path / "model"), open_stored(out)))
    assert abs(found.nll - base.nll) < 0.2


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_with_a_choice(family: str, tmp_path: Path) -> None:
    out = compressed(family, "[prefix: {tokens: [5]}, auto: {candidates: [[hadamard], [shift, cat: {block: 16}]]}, clip]", tmp_path, *FINE)
    base, found = (score(opened, ids()) for opened in (open_checkpoint(tmp_path / "model"), open_stored(out)))
    assert abs(found.nll - base.nll) < 0.2


@pytest.mark.parametrize("steps", [name for name in STEPS if name != "all"])
def test_eight_bits_lose_little_with_any_step(steps: str, tmp_path: Path) -> None:
    out = compressed("qwen2", STEPS[steps], tmp_path, *FINE)
    with torch.no_grad():
        found, base = planish.load(out)(ids()).logits, planish.load(tmp_path / "model")(ids()).logits
    assert distance(found, base) < 0.03


@pytest.mark.parametrize("family", CONFIGS)
def test_fixed_scales_know_what_a_shift_took(family: str, tmp_path: Path) -> None:
    """OutlierTune: each channel's own range fills the one grid, in every site that can take a scale, and no site gives its fixed scale up."""
    model = source(family, tmp_path / "model", torch.float32)
    result = planish.compress(quick("paper-outliertune"), model, tmp_path / "out")
    assert max(block.equivalence for block in result.blocks) < 1e-4
    assert not any(site.made_dynamic for block in result.blocks for site in block.sites.values())
    with torch.no_grad():
        found, base = planish.load(tmp_path / "out")(ids()).logits, planish.load(model)(ids()).logits
    assert distance(found, base) < 0.6  # ranges that 128 tokens set clip what other tokens hold, channel by channel
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} >= {"input_scale", "weight_scale"}


def test_a_shift_makes_fixed_scales_finer(tmp_path: Path) -> None:
    """Channels that lie far from zero: the grid need not reach there any more, and the sink check sees ranges behind the shift."""
    model = source("opt", tmp_path / "model", torch.float32)
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("self_attn_layer_norm.bias"):
            tensor[::8] += 30
    save_file(tensors, file, metadata={"format": "pt"})
    scales = []
    for out, steps in ((tmp_path / "plain", "[]"), (tmp_path / "shifted", "[shift: {by: middle}]")):
        planish.compress(quick("w8a8-static", f"steps={steps}", "scheme.activations.symmetric=true"), model, out)
        stored = load_file(out / "model.safetensors")
        scales.append(float(next(tensor for name, tensor in stored.items() if name.endswith("0.self_attn.q_proj.input_scale"))))
    assert scales[1] < 0.2 * scales[0]


def test_fixed_scales_do_not_know_what_other_steps_make(tmp_path: Path) -> None:
    with pytest.raises(
        PlanishError, match=r"static scales do not know what hadamard makes of inputs at run time.*or use steps that weights absorb, shift, prefix"
    ):
        quick("w8a8-static", "steps=[shift, hadamard]")


def test_other_consumers_refuse_the_checkpoint(tmp_path: Path) -> None:
    out = compressed("llama", STEPS["hadamard"], tmp_path)
    assert json.loads((out / "config.json").read_text())["planish"]["sites"]["0.qkv"]["chain"][0]["kind"] == "hadamard"
    with by_itself(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
    assert check_structure(read_layout(out)).ok
    tensors, guard = merge(out), "model.layers.0.self_attn.q_proj.weight"
    del tensors[guard]
    for change, words in ({}, "missing"), ({guard: torch.ones(1, dtype=torch.uint8)}, "not empty"):
        rewrite(out, {**tensors, **change})
        found = check_structure(read_layout(out))
        assert found.message == f"{guard} is {words}, so other software would load a checkpoint that planish alone runs"


def test_the_prefix_stands_before_everything_that_a_loaded_model_runs(tmp_path: Path) -> None:
    """Logits are those of planish's own evaluation; generate(), cached and padded, goes on as they say."""
    out = compressed("llama", "[prefix: {tokens: [5, 7]}, hadamard]", tmp_path, *FINE)
    model, runner = planish.load(out), BlockRunner(open_stored(out), torch.float32, torch.device("cpu"))
    with torch.no_grad(), runner.head() as head:
        (hidden,) = final_hidden(runner, [ids()])
        expected = torch.stack([torch.cat(list(head.logits(hidden_LD))) for hidden_LD in hidden])
        for cached in (False, True):
            assert distance(model(ids(), use_cache=cached).logits, expected) < 1e-5
        grown = model.generate(ids(), max_new_tokens=6, do_sample=False, eos_token_id=None)
        longer = ids()
        for _ in range(6):
            longer = torch.cat([longer, model(longer, use_cache=False).logits[:, -1].argmax(-1)[:, None]], dim=1)
        assert torch.equal(grown, longer)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids()], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids())], dim=1)
        again = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(again[:, 3:], grown)
