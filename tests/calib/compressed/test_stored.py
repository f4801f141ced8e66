"""Compressed checkpoints opened again: the same numbers as the quantized layers that they hold, and clear errors for what is no such checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, merge, rewrite
from helpers_stored import rounded, saved
from tiny_models import tiny, tokens
from transformers import PreTrainedModel

from planish.calib.blocks.sites import reader_weight
from planish.calib.compressed.quantized import load_rest
from planish.calib.compressed.stored import StoredCheckpoint, is_compressed, open_any, open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.shards import read_json
from planish.calib.walk.runner import BlockRunner
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import QuantizedLinear, StaticGrid
from planish.quant.solvers import Rtn

W4 = WeightFormat(bits=4, granularity="group", group_size=32)
SCHEMES = {
    "w4": Scheme(weights=W4),
    "w4a": Scheme(weights=WeightFormat(bits=4, symmetric=False)),
    "w8a8": Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8)),
    "static": Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8, symmetric=False, granularity="tensor", dynamic=False)),
}
GRID = StaticGrid(torch.tensor([[0.03125]]), torch.tensor([[5.0]]))


@torch.no_grad()
def fake_quantized(model: PreTrainedModel, scheme: Scheme, prefix: str) -> PreTrainedModel:
    """The model with each block linear as a QuantizedLinear made from its own weights."""
    for name, module in list(model.named_modules()):
        if name.startswith(prefix) and hasattr(module, "weight") and module.weight.dim() == 2:
            assert scheme.weights is not None
            weight = Rtn().solve(reader_weight(module), scheme.weights, None, torch.bfloat16).weight
            static = None if scheme.activations is None or scheme.activations.dynamic else GRID
            model.set_submodule(name, QuantizedLinear(weight, module.bias, scheme.activations, static))
    return model


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "llama-biased", "gpt2", "opt-350m"])
def test_reloaded_computes_what_was_stored(family: str, scheme: str, tmp_path: Path) -> None:
    how = SCHEMES[scheme]
    source = saved(tiny(family), tmp_path / "model")
    folder = rounded(source, tmp_path / "out", Scheme(weights=how.weights, activations=how.activations), GRID if scheme == "static" else None)
    outside = ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]
    edit_json(folder / "config.json", quantization_config={**_config(folder), "ignore": outside})
    checkpoint = open_stored(folder)
    runner = BlockRunner(checkpoint, torch.float32, torch.device("cpu"))
    ids = tokens(2, 17)
    expected = fake_quantized(tiny(family), how, runner.topology.blocks)(ids).logits
    ((hidden, call),) = runner.start([ids])
    for index in range(runner.topology.block_count):
        hidden = call.run(runner.load_block(index), index, hidden)
        runner.release_block(index)
        assert not [1 for module in runner.blocks[index].modules() if isinstance(module, QuantizedLinear)]
    with runner.head() as head:
        found = torch.stack([torch.cat(list(head.logits(h_LD))) for h_LD in hidden])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _config(folder: Path) -> dict[str, object]:
    value = read_json(folder / "config.json")["quantization_config"]
    assert isinstance(value, dict)
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rounded(saved(tiny("llama").to(torch.bfloat16), tmp_path / "model", tokenizer=True), tmp_path / "out", SCHEMES["w8a8"])


def test_facts(folder: Path) -> None:
    checkpoint = open_stored(folder)
    assert len(checkpoint.packed) == 3 * 7
    assert checkpoint.tied
    assert checkpoint.unused == ()
    assert not hasattr(checkpoint.config, "quantization_config")
    assert checkpoint.tokenizer() is not None
    checkpoint.check_finite()
    assert is_compressed(folder)
    assert isinstance(open_any(folder), StoredCheckpoint)
    assert not isinstance(open_any(folder.parent / "model"), StoredCheckpoint)
    assert not is_compressed(folder.parent / "model")


def test_a_loaded_block_can_be_loaded_again(folder: Path) -> None:
    runner = BlockRunner(open_stored(folder), torch.float32, torch.device("cpu"))
    for _ in range(2):
        block = runner.load_block(0)
        assert sum(isinstance(module, QuantizedLinear) for module in block.modules()) == 7
        runner.release_block(0)
        assert all(parameter.is_meta for parameter in block.parameters())


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = merge(folder)
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    rewrite(folder, tensors)
    with pytest.raises(PlanishError, match=r"1 tensors are missing, first model.layers.1.mlp.down_proj.weight_scale"):
        open_stored(folder)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (f"{UP}.weight", lambda w: w[:-1], f"{UP}.weight has shape (95, 64)"),
        (f"{UP}.weight", lambda w: w.short(), f"{UP}.weight is int16"),
        (f"{UP}.weight_scale", lambda s: s[:-1], f"{UP}.weight_scale has shape (95, 1)"),
        ("model.norm.weight", lambda w: w[:-1], "model.norm.weight has shape (63,)"),
        ("model.norm.weight", lambda w: w.to(torch.int8), "model.norm.weight is int8"),
        ("model.norm.other", None, "model.norm.other is unexpected"),
        (f"{UP}.planish.up", None, f"{UP}.planish.up is unexpected"),
    ],
)
def test_other_tensors_than_declared_are_named(name: str, edit: Callable[[torch.Tensor], torch.Tensor] | None, message: str, folder: Path) -> None:
    tensors = merge(folder)
    rewrite(folder, {**tensors, name: torch.ones(2) if edit is None else edit(tensors[name]).contiguous()})
    with pytest.raises(PlanishError, match=f"{folder}: {re.escape(message)}.*copy it again, or compress again"):
        open_any(folder)


def test_a_shape_of_packed_codes_that_is_another(tmp_path: Path) -> None:
    folder = rounded(saved(tiny("llama"), tmp_path / "model"), tmp_path / "out", SCHEMES["w4"])
    tensors = merge(folder)
    rewrite(folder, {**tensors, f"{UP}.weight_shape": tensors[f"{UP}.weight_shape"] * 2})
    checkpoint = open_stored(folder)
    with pytest.raises(PlanishError, match=rf"{UP}.weight_shape says \(192, 128\), but the layer is \(96, 64\)"):
        list(checkpoint.parts([UP], torch.float32, "cpu"))


def test_other_quantizers_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PlanishError, match="Give a compressed-tensors checkpoint"):
        open_stored(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, "transformers does not take it: .*nothing"),
        ({"num_attention_heads": 0}, "transformers does not take it"),
        ({"dtype": "float99"}, "transformers does not take it"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 5}}, "quantization_config: 1 validation error"),
        ({"quantization_config": {}}, "the model is not compressed: there is no quantization_config"),
    ],
)
def test_a_damaged_configuration_is_one_message(changes: dict[str, object], message: str, folder: Path) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(PlanishError, match=f"^{folder}/config.json: {message}"):
        open_stored(folder)


def test_not_compressed(folder: Path) -> None:
    with pytest.raises(PlanishError, match="the model is not compressed: there is no quantization_config"):
        open_stored(folder.parent / "model")


def test_a_broken_scale_is_found(folder: Path) -> None:
    tensors = merge(folder)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][0] = float("nan")
    rewrite(folder, tensors)
    with pytest.raises(PlanishError, match="weight_scale has 1 NaN"):
        open_stored(folder).check_finite()


@torch.no_grad()
def test_load_rest_takes_what_is_not_quantized(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny("llama-biased"), tmp_path / "model")), torch.float32, torch.device("cpu"))
    block = runner.load_block(0)
    name = runner.block_name(0)
    before = block.get_submodule("mlp.up_proj").weight.clone()
    stored = {f"{name}.input_layernorm.weight": torch.full((64,), 3.0), f"{name}.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)}
    load_rest(block, name, stored)
    assert bool((block.get_submodule("input_layernorm").weight == 3).all())
    assert torch.equal(block.get_submodule("mlp.up_proj").weight, before)
