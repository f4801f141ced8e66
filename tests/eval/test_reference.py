"""The base model's hidden states from a file: the same comparison, to the last bit, as with the base model run again."""

from pathlib import Path

import pytest
import tiny_models
import torch
from helpers_stored import rounded, saved

from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.reference import Reference, compare_with, make_reference
from planish.eval.scores.score import compare
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat

TEXTS = [tiny_models.tokens(samples=5, length=21), tiny_models.tokens(samples=1, length=8, seed=2), tiny_models.tokens(samples=70, length=40, seed=3)]
W4A8 = Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=8))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_as_compare_finds_it(family: str, tmp_path: Path) -> None:
    base = open_checkpoint(saved(tiny_models.tiny(family), tmp_path / "model"))
    stored = open_stored(rounded(tmp_path / "model", tmp_path / "out", W4A8))
    steps: list[tuple[int, int]] = []
    make_reference(base, TEXTS).save(tmp_path / "reference.safetensors")
    found = compare_with(Reference.load(tmp_path / "reference.safetensors"), base, stored, report=lambda *step: steps.append(step))
    assert found == [compare(base, stored, ids) for ids in TEXTS]
    assert found[0].kl > 0
    assert steps[-1] == (len(steps), len(steps))


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference((TEXTS[0],), (torch.zeros(5, 21, 8),))
    file = tmp_path / "reference.safetensors"

    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.eval.scores.reference.save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            reference.save(file)
    assert not file.exists()
    reference.save(file)
    assert Reference.load(file).hidden[0].shape == (5, 21, 8)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(saved(tiny_models.tiny("llama"), tmp_path / "model"))
    saved(tiny_models.tiny("llama", changes={"vocab_size": 250}), tmp_path / "other")
    stored = open_stored(rounded(tmp_path / "other", tmp_path / "out", W4A8))
    with pytest.raises(PlanishError, match="vocabulary of 250"):
        compare_with(make_reference(base, TEXTS[:1]), base, stored)
