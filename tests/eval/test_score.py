"""Scores and comparisons, against plain forward passes of whole models."""

import math
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers_stored import rounded, saved
from torch import Tensor
from transformers import PreTrainedModel

from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.gate import Gate
from planish.eval.scores.measured import comparison_metrics
from planish.eval.scores.score import Comparison, Divergence, Score, compare, log_probabilities, next_log_probabilities, score
from planish.quant.errors import PlanishError
from planish.quant.formats import Scheme, WeightFormat

IDS = tiny_models.tokens(samples=5, length=21)


def test_perplexity_is_what_the_likelihood_is() -> None:
    found = [Score(nll, 1, (nll,)).perplexity for nll in (0.0, 699.0, 700.0, math.inf, math.nan)]
    assert found[:4] == [1.0, math.exp(699), math.inf, math.inf]
    assert math.isnan(found[4])
    broken = Comparison(base=Score(1.0, 1, (1.0,)), quantized=Score(math.nan, 1, (math.nan,)), kl=math.nan, agreement=0.0)
    metrics = comparison_metrics(broken)
    assert math.isnan(metrics["perplexity"].value)
    assert math.isnan(metrics["perplexity_ratio"].value)
    judged = Gate(perplexity_ratio=2).judge(metrics)
    assert not judged.met
    assert "perplexity_ratio could not be measured" in judged.sentence()


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids_NL: Tensor) -> Tensor:
    """(N (L - 1), V), of all predictions."""
    return model(ids_NL).logits[:, :-1].float().flatten(0, 1)


def plain_nll(logits: Tensor, ids_NL: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits, ids_NL[:, 1:].flatten()).item()


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt-350m", "gpt_neox"])
def test_streamed_is_whole(family: str, tmp_path: Path) -> None:
    model = tiny_models.tiny(family)
    found = score(open_checkpoint(saved(model, tmp_path / "model")), IDS)
    expected = plain_nll(plain_logits(model, IDS), IDS)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.tokens == 5 * 20
    assert found.windows == pytest.approx([plain_nll(plain_logits(model, ids[None]), ids[None]) for ids in IDS], rel=1e-5)


def test_long_windows_are_scored_in_pieces(tmp_path: Path) -> None:
    model = tiny_models.tiny("llama", changes={"max_position_embeddings": 700})
    ids = tiny_models.tokens(samples=4, length=600)
    found = score(open_checkpoint(saved(model, tmp_path / "model")), ids)
    assert found.nll == pytest.approx(plain_nll(plain_logits(model, ids), ids), rel=1e-5)


def test_bfloat16_is_that_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny_models.tiny("llama")
    checkpoint = open_checkpoint(saved(model, tmp_path / "model"))
    expected = plain_nll(plain_logits(model.bfloat16(), IDS), IDS)
    exact = score(checkpoint, IDS).nll
    found = score(checkpoint, IDS, dtype=torch.bfloat16).nll
    assert abs(found - exact) < 2 * abs(expected - exact) + 1e-3


def test_progress_goes_to_the_end(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tiny_models.tiny("llama"), tmp_path / "model"))
    steps: list[tuple[int, int]] = []
    score(checkpoint, IDS, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps.clear()
    compare(checkpoint, checkpoint, IDS, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 7) for i in range(1, 8)]


def test_comparison_is_that_of_whole_models(tmp_path: Path) -> None:
    one, two = tiny_models.tiny("llama"), tiny_models.tiny("llama", seed=3)
    with torch.no_grad():  # near relatives
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.copy_(0.9 * p + 0.1 * q)
    found = compare(open_checkpoint(saved(one, tmp_path / "one")), open_checkpoint(saved(two, tmp_path / "two")), IDS)
    p, q = plain_logits(one, IDS), plain_logits(two, IDS)
    kl = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean").item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-3
    assert found.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).float().mean().item())
    assert found.base.nll == pytest.approx(plain_nll(p, IDS), rel=1e-5)
    assert found.quantized.nll == pytest.approx(plain_nll(q, IDS), rel=1e-5)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tiny_models.tiny("qwen3"), tmp_path / "model"))
    found = compare(checkpoint, checkpoint, IDS)
    assert (found.kl, found.agreement) == (0, 1)
    assert found.base == found.quantized == score(checkpoint, IDS)


def test_stored_model_is_scored_with_its_rounded_weights(tmp_path: Path) -> None:
    model = tiny_models.tiny("llama")
    source = saved(model, tmp_path / "model")
    stored = open_stored(rounded(source, tmp_path / "out", Scheme(weights=WeightFormat(bits=8))))
    found = compare(open_checkpoint(source), stored, IDS)
    assert 0 < found.kl < 0.01
    assert found.quantized == score(stored, IDS)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_no_predictions(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tiny_models.tiny("llama"), tmp_path / "model"))
    with pytest.raises(PlanishError, match="at least one window of at least 2 tokens"):
        score(checkpoint, torch.zeros(shape, dtype=torch.int64))


def test_other_vocabulary(tmp_path: Path) -> None:
    one = open_checkpoint(saved(tiny_models.tiny("llama"), tmp_path / "one"))
    two = open_checkpoint(saved(tiny_models.tiny("llama", changes={"vocab_size": 300}), tmp_path / "two"))
    with pytest.raises(PlanishError, match="vocabulary of 300"):
        compare(one, two, IDS)


def test_divergence_is_a_mean_over_tokens() -> None:
    p, q = torch.randn(7, 11), torch.randn(7, 11)
    whole, parts = Divergence(), Divergence()
    whole.add(p, q)
    for i in range(7):
        parts.add(p[i : i + 1], q[i : i + 1])
    assert parts.mean_kl == pytest.approx(whole.mean_kl, rel=1e-6)
    assert parts.agreement == whole.agreement


def test_small_terms_of_a_large_vocabulary_are_not_lost() -> None:
    """49,151 tokens of 3e-8 each beside one that is nearly certain."""
    logits = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = 18
    expected = logits.double().log_softmax(1)
    assert (next_log_probabilities(logits, torch.full((64,), 7)) - expected[:, 7]).mean().abs() < 1e-6
    assert (log_probabilities(logits) - expected).mean().abs() < 1e-6
