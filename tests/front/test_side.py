"""Side paths and kept subspaces: through the whole compression, for every family; what they hold, what they gain, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from torch import Tensor, nn

import planish
from planish.calib.checkpoint import open_checkpoint
from planish.calib.stored import open_stored
from planish.eval.score import score
from planish.eval.structure import bits, check_structure, check_values, read_layout
from planish.quant.errors import PlanishError
from planish.quant.linear import QuantizedLinear

STEPS = {
    "lorc": "[low_rank: {rank: 3}]",
    "lorc-plain": "[low_rank: {rank: 3, weighted: false}]",
    "svdquant": "[svdquant: {rank: 3, rounds: 2}]",
    "quad": "[quad: {rank: 4}]",
    "resq": "[resq: {share: 0.125}]",
    "super-weight": "[super_weight: {places: [[0, DOWN, 3, 5], [1, DOWN, 2, 1], [0, DOWN, 4, 5]], z: 12}, hadamard]",
    "all": "[prefix: {tokens: [5]}, super_weight: {places: [[1, DOWN, 3, 5]]}, shift, cat: {block: 16}, resq: {share: 0.25}, clip,"
    " svdquant: {rank: 2, rounds: 1}, low_rank: {rank: 2}]",
}
FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver.gptaq.alpha=0")  # so that a wrong path shows
DOWN = {"llama": "mlp.down_proj", "qwen2": "mlp.down_proj"}


def down(model: Path) -> str:
    """The path of a model's last layer of the MLP in its block."""
    topology = planish.calib.topology.topology(open_checkpoint(model).config)
    return next(site.readers[0] for site in topology.sites if site.name == "down")


def compressed(family: str, steps: str, folder: Path, *settings: str) -> Path:
    model = source(family, folder / "model", torch.float32)
    planish.compress(quick("w4a4-fast", f"steps={steps.replace('DOWN', down(model))}", *settings), model, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_with_all_steps(family: str, tmp_path: Path) -> None:
    """compress itself refuses where the reloaded checkpoint differs from the model in memory."""
    out = compressed(family, STEPS["all"], tmp_path, *FINE)
    base, found = (score(opened, ids()) for opened in (open_checkpoint(tmp_path / "model"), open_stored(out)))
    assert abs(found.nll - base.nll) < 0.2
    layout = read_layout(out)
    for check in (check_structure(layout), check_values(layout)):
        assert check.ok, check.message
    assert bits(layout)["quantized_bits"] > 8


@pytest.mark.parametrize("steps", [name for name in STEPS if name != "all"])
@pytest.mark.parametrize("weight_only", [False, True])
def test_eight_bits_lose_little_with_any_step(steps: str, weight_only: bool, tmp_path: Path) -> None:
    scheme = ("scheme.activations=null",) if weight_only else ("scheme.activations.bits=8",)
    out = compressed("qwen2", STEPS[steps], tmp_path, "scheme.weights.bits=8", "solver.gptaq.alpha=0", *scheme)
    with torch.no_grad():
        found, base = planish.load(out)(ids()).logits, planish.load(tmp_path / "model")(ids()).logits
    assert distance(found, base) < 0.03
