"""Text that a model writes itself: drawn as the model has it likely, the same again, and written once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_compress import VOCABULARY, quick, source

import planish
from planish.calib.data import own_text as module
from planish.calib.data.own_text import own_text
from planish.calib.data.windows import start_token
from planish.calib.files.checkpoint import open_checkpoint
from planish.planning.preflight import make_plan
from planish.quant.errors import PlanishError
from planish.recipe.schema import Recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


def test_every_token_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than are written at once; with a model that is sure of every next token there is one text only, that of its likeliest ones."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "TOP_P", 1e-6)
    folder = source("llama", tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    ids_NL, start = own_text(checkpoint, 3, 7, 0, CPU), start_token(checkpoint.tokenizer())
    assert ids_NL.shape == (3, 7)
    assert torch.equal(ids_NL[0], ids_NL[2])
    model = planish.load(folder, dtype=torch.float32)
    with torch.no_grad():
        likeliest = model(torch.tensor([[start, *ids_NL[0, :-1].tolist()]])).logits.argmax(-1)
    assert (likeliest[0] == ids_NL[0]).float().mean() > 0.7  # bfloat16 may tie


def test_samples_differ_and_the_seed_decides(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source("llama", tmp_path / "model"))
    first, other = (own_text(checkpoint, 4, 12, seed, CPU) for seed in (0, 1))
    assert len({tuple(sample.tolist()) for sample in (*first, *other)}) == 8
    assert int(first.max()) < VOCABULARY


def test_it_is_written_once_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(source("llama", tmp_path / "model"))
    state = torch.random.get_rng_state()
    first = own_text(checkpoint, 2, 9, 0, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = module._written(checkpoint, 2, 9, 0, CPU)
    assert torch.equal(first, again)
    monkeypatch.setattr(module, "_written", None)
    assert torch.equal(own_text(checkpoint, 2, 9, 0, CPU), first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_plan_says_what_writing_takes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values are those of the cache that the model leaves; one layer's are there twice."""
    folder, recipe = source(family, tmp_path / "model"), quick("w8a8", "calibration.source=model")
    with monkeypatch.context() as patch:
        patch.setattr("planish.planning.preflight.free_bytes", lambda _device: 1000)
        with pytest.raises(PlanishError, match=r"calibration.source: model: all of the model is in memory while it writes, about .* 1.0 kB are free"):
            make_plan(recipe, folder, device="cpu")
    found = make_plan(recipe, folder, device="cpu").writing
    assert found is not None
    checkpoint, calibration = open_checkpoint(folder), recipe.calibration
    assert calibration is not None
    model = module._model(checkpoint, CPU)
    assert found.weights == sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with torch.no_grad():
        layers = model(torch.zeros(calibration.samples, calibration.length + 1, dtype=torch.int64), use_cache=True).past_key_values.layers
    held = sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
    assert found.waiting == held // len(layers) * (len(layers) + 1)
    assert make_plan(quick("w8a8"), folder, device="cpu").writing is None
    with monkeypatch.context() as patch:  # it is written by now
        patch.setattr("planish.planning.preflight.writing", lambda *_args: replace(found, weights=10**15))
        assert make_plan(recipe, folder, device="cpu").writing is not None


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_model_is_calibrated_on_its_own_text(family: str, tmp_path: Path) -> None:
    recipe: Recipe = quick("w4a4-fast", "calibration.source=model")
    done = planish.compress(recipe, source(family, tmp_path / "model"), tmp_path / "out")
    assert all(block.error is not None for block in done.blocks)
