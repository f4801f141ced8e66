"""planish as a library: its names, models loaded back into memory, the example."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_front import tree
from transformers import AutoModelForCausalLM, GenerationConfig

import planish
from planish.calib.compressed.stored import open_stored
from planish.calib.data.windows import tokens
from planish.eval.scores.score import score

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = planish.Recipe(
    name="own",
    calibration=planish.Calibration(samples=4, length=64),
    steps=(planish.Smooth(),),
    scheme=planish.Scheme(weights=planish.WeightFormat(bits=8), activations=planish.ActivationFormat(bits=8)),
    solver=planish.Gptq(),
)


@pytest.mark.parametrize("name", sorted({*planish.__all__} - {"__version__"}))
def test_public_name(name: str) -> None:
    value = getattr(planish, name)
    assert callable(value)
    assert value.__doc__
    assert getattr(planish, name) is value
    assert name in dir(planish)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        planish.squash  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_an_arithmetic_that_no_compression_has(dtype: Any, original: Path, tmp_path: Path) -> None:
    with pytest.raises(planish.PlanishError, match=r"but the arithmetic of a compression is torch.float32 or torch.bfloat16"):
        planish.compress(RECIPE, original, tmp_path / "out", dtype=dtype)


def test_load_is_what_was_measured(original: Path, tmp_path: Path) -> None:
    """The loaded model's log-likelihood equals that of the checkpoint run block by block."""
    result = planish.compress(RECIPE, original, tmp_path / "out")
    assert [block.index for block in result.blocks] == [0, 1, 2]
    stored = open_stored(tmp_path / "out")
    ids = tokens("builtin", stored.tokenizer(), samples=3, length=64, part="evaluation")
    model = planish.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert nll == pytest.approx(score(stored, ids).nll, rel=1e-5)


@pytest.mark.parametrize("compressed", [False, True])
def test_loaded_model(compressed: bool, original: Path, tmp_path: Path) -> None:
    folder = original
    if compressed:
        folder = tmp_path / "out"
        planish.compress(RECIPE, original, folder)
    model = planish.load(folder)
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta or parameter.requires_grad]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert ids.shape == (1, 11)


def test_loaded_original_equals_transformers(original: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(planish.load(original)(ids).logits, AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)(ids).logits)


def test_generation_config_comes_along(model: Path) -> None:
    GenerationConfig(max_new_tokens=3, eos_token_id=7).save_pretrained(model)
    assert planish.load(model).generation_config.max_new_tokens == 3


def test_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(planish.PlanishError, match="no such folder"):
        planish.load(tmp_path / "nowhere")


def test_plan_writes_nothing(original: Path, tmp_path: Path) -> None:
    for recipe in (RECIPE, "w8a8"):
        plan = planish.plan(recipe, original, out=tmp_path / "out")
        assert plan.bits_per_weight > 8
    assert not tree(tmp_path)


def test_example(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_pipeline.py"))["run"](str(original), str(tmp_path / "out"))
    assert "block 2: relative error 0." in capsys.readouterr().out


def test_example_of_inspection(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "inspect_model.py"))["run"](str(original), str(tmp_path / "recipe.yaml"), samples=3, length=32)
    said = capsys.readouterr().out
    assert "* No massive activations" in said
    assert "bits per weight" in said
    assert planish.load_recipe(tmp_path / "recipe.yaml").name == "w8a8-recommended"
