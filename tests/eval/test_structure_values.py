"""What is checked of a checkpoint's values and declaration without running it: at the edges of what is allowed, and wherever in a tensor it lies."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, merge, rewrite
from helpers_stored import rounded, saved
from tiny_models import tiny
from torch import Tensor

from planish.calib.compressed.layout import read_layout
from planish.calib.files.shards import read_header
from planish.eval.scores.check import listed
from planish.eval.verifying.structure import check_structure, check_values, extent
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import StaticGrid

UP = "model.layers.1.mlp.up_proj"
SCHEME = Scheme(
    weights=WeightFormat(bits=4, symmetric=False, granularity="channel"),
    activations=ActivationFormat(bits=8, symmetric=False, granularity="tensor", dynamic=False),
)
GRID = StaticGrid(torch.tensor([[0.05]]), torch.tensor([[3.0]]))
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Asymmetric 4-bit codes, one a byte, and static asymmetric inputs: every kind of tensor that holds numbers."""
    return rounded(saved(tiny("llama"), tmp_path / "model"), tmp_path / "out", SCHEME, GRID)


def edited(out: Path, name: str, position: int, value: float) -> Path:
    tensors = merge(out)
    tensors[name].view(-1)[position] = value
    rewrite(out, tensors)
    return out


def test_the_first_faults_are_listed() -> None:
    assert listed(["a", "b", "c", "d", "e"]) == "a; b; c; d; e"
    assert listed(["a", "b", "c", "d", "e", "f"]) == "a; b; c; d; e; and 1 more"


def test_a_good_one(out: Path) -> None:
    layout = read_layout(out)
    assert check_structure(layout).ok
    assert check_values(layout).ok


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{UP}.weight", 8, "has values from -8 to 8, but 4 bits hold -8 to 7"),
        (f"{UP}.weight", -9, "has values from -9 to 7, but 4 bits hold -8 to 7"),
        (f"{UP}.weight_zero_point", 8, "to 8, but 4 bits hold -8 to 7"),
        (f"{UP}.weight_zero_point", -9, "has values from -9 to"),
        (f"{UP}.weight_scale", 0, "has scales that are not positive, the smallest 0"),
        (f"{UP}.weight_scale", torch.inf, "has NaN or infinite values"),
        (f"{UP}.weight_scale", -torch.inf, "has NaN or infinite values"),
        (f"{UP}.input_scale", 0, "has scales that are not positive, the smallest 0"),
        ("model.norm.weight", torch.nan, "has NaN or infinite values"),
    ],
)
def test_one_number(name: str, value: float, message: str, position: int, out: Path) -> None:
    found = check_values(read_layout(edited(out, name, position, value)))
    assert found.ok is False
    assert found.message.startswith(f"{name} has ")
    assert message in found.message
    assert ";" not in found.message


def test_a_weight_that_uses_fewer_bits_than_declared(out: Path) -> None:
    """7 of 8 bits, all of one sign or of both; zeros alone say nothing."""
    tensors = merge(out)
    codes = [name for name in tensors if name.endswith("proj.weight")]
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    values["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    edit_json(out / "config.json", quantization_config=values)
    for low, high, needed in ((0, 0, None), (-64, 63, 7), (-64, 0, 7), (0, 64, 8), (-65, 0, 8), (0, 1, 2)):
        for name in codes:
            tensors[name] = torch.full_like(tensors[name], low)
            tensors[name][0, 0] = high
        rewrite(out, tensors)
        found = check_values(read_layout(out))
        assert found.ok is (needed in (None, 8)), (low, high)
        assert found.ok or found.message == f"config.json declares 8-bit weights, but no code needs more than {needed} bits"


@pytest.mark.parametrize("position", [0, 5, 23])
@pytest.mark.parametrize("value", [100.0, -100.0, torch.nan])
def test_extremes_are_found_in_every_piece(value: float, position: int, tmp_path: Path) -> None:
    """Read in pieces of 8 numbers."""
    tensor = torch.linspace(-1, 1, 24)
    tensor[position] = value
    rewrite(tmp_path, {"a": tensor})
    low, high = extent(read_header(tmp_path / "model.safetensors")["a"], torch.empty(32, dtype=torch.uint8))
    if value != value:
        assert (low != low, high != high) == (True, True)
    else:
        assert (low, high) == (tensor.min(), tensor.max())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{UP}.weight_zero_point", lambda z: z.to(torch.int32), f"{UP}.weight_zero_point is int32"),
        (f"{UP}.input_zero_point", lambda z: z.to(torch.int32), f"{UP}.input_zero_point is int32"),
        (f"{UP}.weight_scale", lambda s: s[:, 0], f"{UP}.weight_scale has shape (96,)"),
        (f"{UP}.weight_scale", lambda s: s.double(), f"{UP}.weight_scale is float64"),
        (f"{UP}.planish.guard", lambda _: torch.ones(1), f"{UP}.planish.guard is unexpected"),
    ],
)
def test_one_tensor(name: str, change: Callable[[Tensor | None], Tensor], message: str, out: Path) -> None:
    tensors = merge(out)
    rewrite(out, {**tensors, name: change(tensors.get(name)).contiguous()})
    found = check_structure(read_layout(out))
    assert (found.ok, found.message.startswith(message)) == (False, True), found.message
