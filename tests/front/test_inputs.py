"""Steps that transform inputs at run time, clips and the prefix: through the whole compression, for every family."""

import json
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

import planish
from planish.calib.checkpoint import open_checkpoint
from planish.calib.stored import open_stored
from planish.eval.score import score

STEPS = {
    "cat": "[cat: {block: 16}]",
    "cat-odd": "[cat: {block: 12, hadamard: false}]",
    "wush": "[wush: {block: 16}]",
    "hadamard": "[hadamard: {seeds: 2}]",
    "duquant": "[duquant: {block: 16, steps: 8}]",
    "shift": "[shift, hadamard]",
    "middle": "[shift: {by: middle}]",
    "all": "[prefix: {tokens: [5]}, shift, duquant: {block: 16, steps: 4}, cat: {block: 16}, clip]",
}
FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver.gptaq.alpha=0")  # so that a wrong transform shows


def compressed(family: str, steps: str, folder: Path, *settings: str) -> Path:
    model = source(family, folder / "model", torch.float32)
    planish.compress(quick("w4a4-fast", f"steps={steps}", *settings), model, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_with_all_steps(family: str, tmp_path: Path) -> None:
    """compress itself refuses where the reloaded checkpoint differs from the model in memory."""
    out = compressed(family, STEPS["all"], tmp_path, *FINE)
    base, found = (score(opened, ids()) for opened in (open_checkpoint(tmp_path / "model"), open_stored(out)))
    assert abs(found.nll - base.nll) < 0.2


@pytest.mark.parametrize("steps", [name for name in STEPS if name != "all"])
def test_eight_bits_lose_little_with_any_step(steps: str, tmp_path: Path) -> None:
    out = compressed("qwen2", STEPS[steps], tmp_path, *FINE)
    with torch.no_grad():
        found, base = planish.load(out)(ids()).logits, planish.load(tmp_path / "model")(ids()).logits
    assert distance(found, base) < 0.03


def test_other_consumers_refuse_the_checkpoint(tmp_path: Path) -> None:
    out = compressed("llama", STEPS["hadamard"], tmp_path)
    assert json.loads((out / "config.json").read_text())["planish"]["sites"]["0.qkv"]["chain"][0]["kind"] == "hadamard"
    with pytest.raises(ValueError, match="planish-pack-quantized"):
        AutoModelForCausalLM.from_pretrained(out)
