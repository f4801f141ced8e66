"""Side paths and kept subspaces: through the whole compression, for every family; what they hold, what they gain, what is refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from helpers_front import tree
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from torch import Tensor

import planish
from planish.calib.blocks.topology import topology
from planish.calib.compressed.layout import read_layout
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.score import score
from planish.eval.verifying.structure import bits, check_structure, check_values
from planish.quant.errors import PlanishError

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
SQUARE = {"hidden_size": 32, "num_key_value_heads": 4, "intermediate_size": 32}  # every linear layer is 32 by 32
COARSE = ("scheme.weights.bits=2", "scheme.activations=null", "solver=rtn")  # so that what a path makes up for shows


def down(model: Path) -> str:
    """The path of a model's last layer of the MLP in its block."""
    return topology(open_checkpoint(model).config).block(0).inside[-1].readers[0]


def compressed(family: str, steps: str, folder: Path, *settings: str, changes: Mapping[str, int] | None = None) -> Path:
    model = source(family, folder / "model", torch.float32, changes)
    planish.compress(quick("w4a4-best", f"steps={steps.replace('DOWN', down(model))}", *settings), model, folder / "out")
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


def loss(out: Path) -> float:
    """How far the checkpoint's logits are from those of its model."""
    with torch.no_grad():
        return distance(planish.load(out)(ids()).logits, planish.load(out.parent / "model")(ids()).logits)


@pytest.mark.parametrize(
    ("steps", "some"),
    [
        ("[low_rank: {rank: 32, weighted: false}]", "[low_rank: {rank: 8, weighted: false}]"),
        ("[low_rank: {rank: 32}]", "[low_rank: {rank: 8}]"),
        ("[svdquant: {rank: 32, rounds: 0}]", "[svdquant: {rank: 8}]"),
        ("[resq: {share: 0.97}]", "[resq]"),
        ("[quad: {rank: 31}]", "[quad: {rank: 8}]"),
    ],
)
def test_the_more_is_beside_the_less_is_lost(steps: str, some: str, tmp_path: Path) -> None:
    """Weights of 2 bits are hardly weights any more; what makes up for all of them computes what they did."""
    none, part, full = (compressed("llama", what, tmp_path / str(i), *COARSE, changes=SQUARE) for i, what in enumerate(("[]", some, steps)))
    assert loss(full) < 0.04
    assert 2 * loss(full) < loss(part) < 0.95 * loss(none)


def plant(model: Path) -> tuple[str, int, int]:
    """Make a weight of a model's second block a super weight: path, row, column."""
    path, file = down(model), model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f".1.{path}.weight"))
    tensors[name][7, 30] = 3000 * tensors[name].abs().mean()
    save_file(tensors, file, metadata={"format": "pt"})
    return path, 7, 30


@pytest.mark.parametrize("transform", ["", ", hadamard"])
def test_super_weights_are_found_and_held_out(transform: str, tmp_path: Path) -> None:
    """One row's scale would be that of the planted weight; the others come out the same bits in either way."""
    model = source("llama", tmp_path / "model", torch.float32)
    path, row, column = plant(model)
    outs = {}
    for name, steps in {"without": f"[{transform[2:]}]", "auto": f"[super_weight{transform}]"}.items():
        recipe = quick("w4a4-best", f"steps={steps}", "scheme.weights.bits=4", "scheme.activations=null", "solver=rtn")
        planish.compress(recipe, model, tmp_path / name)
        outs[name] = tmp_path / name
    config = json.loads((outs["auto"] / "config.json").read_text())["planish"]["sites"]
    assert [address for address, site in config.items() if site["ranks"]] == ["1.down"]
    assert config["1.down"]["ranks"] == {path: 1}
    manifest = json.loads((outs["auto"] / "planish" / "manifest.json").read_text())
    assert manifest["blocks"][1]["sites"]["down"]["note"] == f"beside the codes: {path}[{row}, {column}]"
    layer, plain = (planish.load(outs[name]).get_submodule(f"model.layers.1.{path}") for name in ("auto", "without"))
    others = torch.arange(len(layer.matrix)) != row
    if not transform:
        assert torch.equal(layer.matrix[others], plain.matrix[others])
        assert layer.matrix[row, column] == 0
    weight_OI = load_file(model / "model.safetensors")[f"model.layers.1.{path}.weight"]
    x_TC = torch.randn(40, weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
    true_TO, found_TO, plain_TO = x_TC @ weight_OI.T, layer(x_TC), plain(x_TC)
    assert distance(found_TO[:, row], true_TO[:, row]) < 0.1 * distance(plain_TO[:, row], true_TO[:, row])


def test_z_clips_what_remains(tmp_path: Path) -> None:
    model = source("llama", tmp_path / "model", torch.float32)
    path, row, column = plant(model)
    recipe = quick("w4a4-best", "steps=[super_weight: {places: [], z: 2}]", "scheme.weights.bits=8", "scheme.activations=null", "solver=rtn")
    planish.compress(recipe, model, tmp_path / "out")
    weight_OI = load_file(model / "model.safetensors")[f"model.layers.1.{path}.weight"].double()
    limit = float(weight_OI.mean() + 2 * weight_OI.std(correction=0))
    found_OI = planish.load(tmp_path / "out").get_submodule(f"model.layers.1.{path}").matrix
    assert found_OI[row, column] == pytest.approx(limit, rel=1e-5)


def test_without_text(tmp_path: Path) -> None:
    """Paths that look at weights alone need none."""
    steps = "steps=[super_weight: {places: [[0, mlp.down_proj, 1, 2]]}, low_rank: {rank: 32, weighted: false}]"
    out = compressed("llama", "[]", tmp_path, steps, *COARSE, "calibration=null", changes=SQUARE)
    assert loss(out) < 1e-3
    config = json.loads((out / "config.json").read_text())["planish"]["sites"]
    assert config["0.down"]["ranks"] == {"mlp.down_proj": 33}


class Stopping:
    """Progress that interrupts the run after the first block."""

    def say(self, text: str) -> None:
        pass

    def stage(self, name: str, steps: int) -> None:
        self.name = name

    def step(self, done: int, note: str = "") -> None:
        if self.name == "blocks" and done == 1:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    out = compressed("llama", STEPS["all"], tmp_path)
    recipe = quick("w4a4-best", f"steps={STEPS['all'].replace('DOWN', 'mlp.down_proj')}")
    with pytest.raises(KeyboardInterrupt):
        planish.compress(recipe, tmp_path / "model", tmp_path / "again", progress=Stopping())
    planish.compress(recipe, tmp_path / "model", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(out)


def broken(out: Path, tmp_path: Path, name: str, tensor: Tensor | None) -> str:
    """What the structure check says where one tensor of a side path is gone or another."""
    folder = Path(shutil.copytree(out, tmp_path / "broken"))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, file, metadata={"format": "pt"})
    if tensor is None:
        with pytest.raises(PlanishError, match="tensors are missing"):
            open_stored(folder)
    check = check_structure(read_layout(folder))
    assert not check.ok
    shutil.rmtree(folder)
    return check.message


def test_damaged_side_paths_are_named(tmp_path: Path) -> None:
    out = compressed("llama", STEPS["all"], tmp_path)
    name = "model.layers.0.self_attn.q_proj.planish"
    assert f"{name}.kept_scale is missing" in broken(out, tmp_path, f"{name}.kept_scale", None)
    assert f"{name}.up is missing" in broken(out, tmp_path, f"{name}.up", None)
    assert "of shape (5, 1)" in broken(out, tmp_path, f"{name}.up", torch.ones(5, 1))
    assert f"{name}.kept is float32" in broken(out, tmp_path, f"{name}.kept", torch.ones(32, 8))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[low_rank: {rank: 0}]", "low_rank.rank is 0"),
        ("[low_rank: {rank: 33}]", "at most 32"),
        ("[svdquant: {rank: 4, rounds: -1}]", "svdquant.rounds is -1"),
        ("[svdquant: {rank: 33}]", "at most 32"),
        ("[quad: {rank: 64}]", "64 channels to keep"),
        ("[quad: {rank: 8}, hadamard]", "Put it before them"),
        ("[quad: {rank: 8}, resq]", "Put it before them"),
        ("[resq: {share: 1}]", "resq.share is 1"),
        ("[resq: {bits: 16}]", "resq.bits is 16"),
        ("[resq: {bits: 3}]", "resq.bits is 3, but site 0.qkv has 4 bits"),
        ("[super_weight: {z: 0}]", "super_weight.z is 0"),
        ("[fold_norms, rotate: {at: residual}, super_weight]", "rotate at residual moves weights"),
        ("[super_weight, permute]", "permute moves weights"),
        ("[super_weight: {places: []}]", "nothing would be done"),
        ("[super_weight: {places: [[0, mlp.down_proj, 0]]}]", "expected a list of 4, got one of 3"),
        ("[super_weight: {places: [[0, mlp.down_proj, 0, 0, 0]]}]", "expected a list of 4, got one of 5"),
        ("[super_weight: {places: [[3, mlp.down_proj, 0, 0]]}]", "no quantized layer"),
        ("[super_weight: {places: [[0, mlp.down, 0, 0]]}]", "no quantized layer"),
        ("[super_weight: {places: [[0, mlp.down_proj, 64, 0]]}]", "is 64 by"),
        ("[super_weight: {places: [[0, mlp.down_proj, 0, 0]], sites: 1.*}]", "no quantized layer"),
    ],
)
def test_impossible_steps_are_refused(steps: str, message: str, original: Path) -> None:
    with pytest.raises(PlanishError, match=message):
        planish.plan(quick("w4a4-best", f"steps={steps}"), original)


@pytest.mark.parametrize("steps", ["[low_rank]", "[svdquant]", "[quad]", "[resq]", "[super_weight]", "[hadamard]", "[prefix]"])
def test_steps_that_need_text_say_so(steps: str) -> None:
    with pytest.raises(PlanishError, match=f"calibration is null, but the step {steps[1:-1]}"):
        quick("w4a4-best", f"steps={steps}", "solver=rtn", "calibration=null")
