"""Every family with every shipped recipe: compressed, reloaded by planish and by stock transformers, the same numbers everywhere.

Where transformers cannot run a checkpoint (GPT-2, whose layers are Conv1D), it refuses it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from tiny_models import CONFIGS, FAMILIES, MIXTURES, RELATIVES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import planish
from planish.eval.verifying.probe import read_probe
from planish.eval.verifying.stock import by_itself, wide
from planish.quant import linear
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, activation_grid
from planish.quant.linear import QuantizedLinear
from planish.quant.transforms.smooth import Smooth
from planish.recipe.schema import Recipe, load_recipe, with_settings

RECIPES = ("w8a8", "w8a8-static", "w4a8", "w4a16-g128", "w4a16-channel", "w8a8-fp8", "w4a4-nvfp4")
VARIANTS = tuple(name for name in CONFIGS if name not in FAMILIES)
CASES = [(family, recipe) for family in FAMILIES for recipe in RECIPES if family != "gpt2" or "fp" not in recipe]
CASES += [(family, recipe) for family in VARIANTS for recipe in RECIPES[1:7:2]]
CASES += [(family, "w8a8") for family in RELATIVES]
CONV1D = ("gpt2",)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: source(family, root / family) for family in CONFIGS | RELATIVES}


def divided_by_half_steps(x_TC: Tensor, fmt: ActivationFormat, _: object = None) -> tuple[Tensor, Tensor | None]:
    """Per token, as compressed-tensors emulates it: where symmetric it divides the maximum by 127.5, where servers (and planish) divide by 127."""
    assert fmt.granularity == "token"
    if not fmt.symmetric:
        return activation_grid(x_TC, fmt)
    return x_TC.abs().amax(1, keepdim=True) / 127.5, None


def stock(folder: Path) -> PreTrainedModel:
    """Loaded by transformers, every tensor in its place."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert isinstance(model, PreTrainedModel)
    model.register_forward_pre_hook(wide)
    return model


@torch.no_grad()
def check_against_probe(folder: Path, model: PreTrainedModel) -> None:
    """The reloaded model says of the calibration text what the model in memory said."""
    probe = read_probe(folder)
    assert probe is not None
    token_ids = probe["input_ids"]
    log_probabilities = model(token_ids).logits.log_softmax(-1)[:, :-1].gather(2, token_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_probabilities, probe["next_logprobs"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_stock(folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock transformers has the same weights, bit for bit, and computes the same but for its divisor of activations."""
    other = stock(folder)
    expected, found = model(ids()).logits, other(ids()).logits
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        weight = layer.matrix if layer.factor is None else layer.matrix * layer.factor.T
        theirs = other.get_submodule(name)
        assert isinstance(theirs, nn.Linear)
        assert torch.equal(theirs.weight, weight)
    activations = [layer.activations for layer in layers.values() if layer.activations is not None]
    if activations and all(act.type == "float" for act in activations):
        assert distance(found, expected) < 0.06  # one code that last bits moved is a sixteenth of its value
        return
    if not any(act.dynamic for act in activations):
        assert distance(found, expected) < (3e-3 if activations else 1e-5)  # one code that last bits moved is 5e-4
        return
    assert distance(found, expected) < 0.06
    with monkeypatch.context() as patch:
        patch.setattr(linear, "activation_grid", divided_by_half_steps)
        expected = model(ids()).logits
    assert distance(found, expected) < 0.02  # a negative maximum then lies between two codes, and last bits decide


@torch.no_grad()
@pytest.mark.parametrize(("family", "recipe"), CASES, ids=[f"{family}-{recipe}" for family, recipe in CASES])
def test_family(family: str, recipe: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result = planish.compress(quick(recipe), sources[family], out, dtype=torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    for block in result.blocks:
        assert block.error is not None
        assert 0 < block.error < (0.6 if recipe.startswith("w4") else 0.4)
        assert block.equivalence < 1e-4
    if recipe == "w4a16-g128":
        assert any("128" in note for note in result.plan.notes)
    model = planish.load(out, dtype=torch.float32)
    check_against_probe(out, model)
    if family in CONV1D:
        assert result.plan.servers == ("planish",)
        with by_itself(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(out)
    elif family in MIXTURES and "transformers" in result.plan.servers:
        assert distance(stock(out)(ids()).logits, model(ids()).logits) < 0.01  # which makes bfloat16 weights of the experts' codes
    elif family in MIXTURES:
        with by_itself(), pytest.raises((ValueError, RuntimeError), match=r"experts: for vLLM, or import planish first|ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids()).logits, model(ids()).logits)
    else:
        check_stock(out, model, monkeypatch)


SCHEMES = {
    "4-tensor": planish.Scheme(weights=planish.WeightFormat(bits=4, granularity="tensor")),
    "4-tensor-asymmetric": planish.Scheme(weights=planish.WeightFormat(bits=4, symmetric=False, granularity="tensor")),
    "4-channel-asymmetric": planish.Scheme(weights=planish.WeightFormat(bits=4, symmetric=False)),
    "3-group-asymmetric": planish.Scheme(weights=planish.WeightFormat(bits=3, symmetric=False, granularity="group", group_size=16)),
    "3-group": planish.Scheme(weights=planish.WeightFormat(bits=3, granularity="group", group_size=16)),
    "8-group": planish.Scheme(weights=planish.WeightFormat(bits=8, granularity="group", group_size=32)),
    "8-tensor-8": planish.Scheme(weights=planish.WeightFormat(bits=8, granularity="tensor"), activations=ActivationFormat(bits=8)),
    "fp8-channel": planish.Scheme(weights=planish.WeightFormat(bits=8, type="float")),
    "fp8-channel-token": planish.Scheme(weights=planish.WeightFormat(bits=8, type="float"), activations=ActivationFormat(bits=8, type="float")),
    "fp8-tensor-token": planish.Scheme(
        weights=planish.WeightFormat(bits=8, type="float", granularity="tensor"), activations=ActivationFormat(bits=8, type="float")
    ),
    "nvfp4": planish.Scheme(weights=planish.WeightFormat(bits=4, type="float", granularity="group", group_size=16)),
    "4-channel-asymmetric-8": planish.Scheme(weights=planish.WeightFormat(bits=4, symmetric=False), activations=ActivationFormat(bits=8)),
    "4-tensor-asymmetric-8": planish.Scheme(
        weights=planish.WeightFormat(bits=4, symmetric=False, granularity="tensor"), activations=ActivationFormat(bits=8)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["auto", "int-quantized", "pack-quantized"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_format_in_stock_transformers(
    scheme: str, layout: Any, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(name="any", calibration=None, scheme=SCHEMES[scheme], solver=planish.Rtn(), export=planish.Export(layout=layout))
    if "fp" in scheme and layout != "auto":
        only = "nvfp4-pack-quantized" if scheme == "nvfp4" else "float-quantized"
        with pytest.raises(PlanishError, match=f"export.layout: {layout} is for integers, and floats have {only} alone"):
            planish.compress(recipe, sources["phi3"], tmp_path / "out")
        return
    plan = planish.compress(recipe, sources["phi3"], tmp_path / "out", dtype=torch.float32).plan
    model = planish.load(tmp_path / "out", dtype=torch.float32)
    if "transformers" in plan.servers:
        check_stock(tmp_path / "out", model, monkeypatch)
    else:
        assert ("asymmetric" in scheme and layout != "int-quantized") or recipe.misread
        with by_itself(), pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


SYMMETRIC = "scheme: {weights: {bits: 4}, activations: {bits: 4}}"
MISREAD = {  # settings of w4a8 that make what others would load, and compute something else
    "all sites": ("transformers scales symmetric dynamic activations", "scheme.activations={bits: 4}"),
    "one site": ("transformers scales symmetric dynamic activations", f"overrides=[{{sites: '1.down', {SYMMETRIC}}}]"),
    "packed": ("vLLM leaves quantized activations", "export.layout=pack-quantized"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_others_would_compute_otherwise_they_refuse(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    words, setting = MISREAD[case]
    plan = planish.compress(quick("w4a8", setting), sources["llama"], tmp_path / "out", dtype=torch.float32).plan
    assert plan.servers == ("planish",)
    assert [note for note in plan.notes if words in note and "others refuse the checkpoint" in note]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("planish", "planish-pack-quantized")
    check_against_probe(tmp_path / "out", planish.load(tmp_path / "out", dtype=torch.float32))
    with by_itself(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = planish.verify(tmp_path / "out")
    assert found.ok, found.to_dict()
    assert found["transformers"].ok
    assert "refuses the checkpoint" in found["transformers"].message


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt-350m", "gpt2"])
def test_mixed_schemes_and_kept_sites(family: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (
        planish.Override(sites=("*.down",), keep=True),
        planish.Override(sites=("0.o",), scheme=SCHEMES["3-group"]),
        planish.Override(sites=("1.qkv",), scheme=planish.Scheme(weights=planish.WeightFormat(bits=8), activations=ActivationFormat(bits=8))),
    )
    recipe = Recipe(
        name="mixed",
        calibration=planish.Calibration(samples=4, length=32),
        steps=(Smooth(strength=0.5),),
        scheme=SCHEMES["8-group"],
        overrides=overrides,
        solver=planish.Gptq(),
    )
    out = tmp_path / "out"
    planish.compress(recipe, sources[family], out, dtype=torch.float32)
    model = planish.load(out, dtype=torch.float32)
    check_against_probe(out, model)
    blocks = {"llama": "model.layers", "opt-350m": "model.decoder.layers", "gpt2": "transformer.h"}[family]
    kept = [module for module in model.get_submodule(blocks).modules() if isinstance(module, nn.Linear | Conv1D)]
    assert len(kept) == len(model.get_submodule(blocks))
    if family not in CONV1D:
        check_stock(out, model, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_stored_types(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(family, tmp_path / "model", dtype)
    planish.compress(quick("w8a8-static"), folder, tmp_path / "out")
    model = planish.load(tmp_path / "out")
    assert model.dtype is dtype
    model = planish.load(tmp_path / "out", dtype=torch.float32)
    check_against_probe(tmp_path / "out", model)
    check_stock(tmp_path / "out", model, monkeypatch)
    assert distance(model(ids()).logits, planish.load(folder, dtype=torch.float32)(ids()).logits) < 0.4


def test_floats_are_for_servers(sources: dict[str, Path], tmp_path: Path) -> None:
    for family, settings in (("llama", ["steps=[hadamard]"]), ("llama", ["kv_cache={bits: 8}"]), ("gpt2", [])):
        with pytest.raises(PlanishError, match="scheme: floats in a checkpoint that planish alone runs"):
            planish.compress(quick("w8a8-fp8", *settings), sources[family], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_goes_with_nvfp4(tmp_path: Path) -> None:
    for settings, words in (
        (["steps=[{polish: {clip: false}}]"], "polish moves scales by less than NVFP4's are apart"),
        (["steps=[raise_activations]"], "raise_activations measures what dynamic integers lose"),
        (["steps=[]", "solver=rtn", "calibration=null"], "calibration is null, but a static activation scale"),
    ):
        with pytest.raises(PlanishError, match=words):
            with_settings(load_recipe("w4a4-nvfp4"), settings)
    narrow = source("llama", tmp_path / "narrow", changes={"intermediate_size": 72})
    with pytest.raises(PlanishError, match=r"site 0\.down: its 72 channels are not whole groups of 16\. Keep the site"):
        planish.compress(quick("w4a4-nvfp4"), narrow, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"narrow"}
