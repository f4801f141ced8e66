"""Perplexity and divergence over overlapping windows, against a plain loop over a whole model."""

import math
from pathlib import Path

import pytest
import torch
from helpers_text import build_tokenizer
from tiny_models import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from planish.calib.compressed.stored import open_any
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.score import compare, score
from planish.eval.scores.text_score import BaseHidden, TextSettings, cut, hidden_states, measure_text
from planish.eval.verifying.verify import evaluation_windows
from planish.quant.errors import PlanishError

CPU = torch.device("cpu")
TEXT = "A class is a statement. " * 30


def saved(folder: Path, seed: int = 0, bos: bool = False, positions: int = 128) -> tuple[PreTrainedModel, Path]:
    model = tiny("llama", seed=seed, changes={"vocab_size": 400, "max_position_embeddings": positions})
    model.save_pretrained(folder)
    build_tokenizer(bos=bos).save_pretrained(folder)
    return model, folder


@torch.no_grad()
def reference(model: PreTrainedModel, text_T: Tensor, windows: int, length: int, stride: int) -> tuple[float, int]:
    """Mean negative log-likelihood and predictions, as everybody's loop over strides has it."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, windows * stride, stride):
        end = begin + length
        ids = text_T[None, begin:end]
        targets = ids.clone()
        targets[:, : length - (end - done)] = -100
        logits = model(ids).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits[0], targets[0, 1:], ignore_index=-100, reduction="sum")
        scored = int((targets[0, 1:] != -100).sum())
        total, count, done = total + nll.item(), count + scored, end
    return total / count, count


def stream(folder: Path) -> Tensor:
    checkpoint = open_checkpoint(folder)
    return evaluation_windows(checkpoint, "builtin", 8, 64).flatten()


@pytest.mark.parametrize(("length", "stride"), [(64, None), (64, 16), (48, 1), (50, 49)])
def test_perplexity_is_that_of_a_plain_loop(length: int, stride: int | None, tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "model")
    windows = cut(open_checkpoint(folder), TextSettings(windows=5, length=length, stride=stride))
    found = measure_text(open_checkpoint(folder), windows, None, dtype=torch.float32, device=CPU)
    nll, count = reference(model, stream(folder), 5, length, stride or length)
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.tokens == count
    assert (found.windows, found.length, found.stride, found.bos) == (5, length, stride or length, "none")


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("stride", [None, 100])
def test_perplexity_of_the_demo_model_is_that_of_a_plain_loop(stride: int | None) -> None:
    """A real vocabulary, whose sums are long."""
    checkpoint = open_any("demo:smollm2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    windows = cut(checkpoint, TextSettings(windows=3, length=256, stride=stride))
    found = measure_text(checkpoint, windows, None, dtype=torch.float32, device=CPU)
    nll, count = reference(model, evaluation_windows(checkpoint, "builtin", 3, 256).flatten(), 3, 256, stride or 256)
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.tokens == count


def test_each_token_is_scored_once_where_windows_overlap(tmp_path: Path) -> None:
    windows = cut(open_checkpoint(saved(tmp_path / "model")[1]), TextSettings(windows=5, length=40, stride=7))
    assert sum(windows.counts()) == 39 + 4 * 7
    scored = [int(token) for window, ids in enumerate(windows.ids) for token in ids[windows.first(window) :]]
    assert scored == stream(tmp_path / "model")[1 : 40 + 4 * 7].tolist()


def test_each_window_after_a_token_for_a_beginning(tmp_path: Path) -> None:
    """All of the text has a score then, the first token too; a BOS that the tokenizer writes before the text is not there twice."""
    model, folder = saved(tmp_path / "model", bos=True)
    windows = cut(open_checkpoint(folder), TextSettings(windows=3, length=33, bos="window"))
    found = measure_text(open_checkpoint(folder), windows, None, dtype=torch.float32, device=CPU)
    text_T = stream(folder)[1:]
    ids = torch.cat([torch.zeros(3, 1, dtype=torch.int64), text_T[:96].view(3, 32)], 1)
    assert torch.equal(windows.ids, ids)
    assert found.tokens == 96
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert found.perplexity.value == pytest.approx(expected, rel=1e-6)


def test_without_overlap_it_is_what_is_measured_everywhere(tmp_path: Path) -> None:
    _, one = saved(tmp_path / "one")
    _, two = saved(tmp_path / "two", seed=1)
    base, other = open_checkpoint(one), open_checkpoint(two)
    windows = cut(other, TextSettings(windows=4, length=64))
    ids_NL = evaluation_windows(other, "builtin", 4, 64)
    assert torch.equal(windows.ids, ids_NL)
    hidden = hidden_states(base, windows, dtype=torch.float32, device=CPU)
    found = measure_text(other, windows, BaseHidden(base, hidden), dtype=torch.float32, device=CPU)
    expected = compare(base, other, ids_NL)
    assert found.base is not None
    assert found.perplexity.value == pytest.approx(expected.quantized.perplexity, rel=1e-9)
    assert found.base.perplexity == pytest.approx(expected.base.perplexity, rel=1e-9)
    assert found.base.ratio.value == pytest.approx(expected.quantized.perplexity / expected.base.perplexity, rel=1e-9)
    assert found.base.kl.value == pytest.approx(expected.kl, rel=1e-9)
    assert found.base.agreement.value == pytest.approx(expected.agreement)


def test_errors_are_those_of_windows(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    found = measure_text(checkpoint, cut(checkpoint, TextSettings(windows=4, length=64)), None, dtype=torch.float32, device=CPU)
    means = torch.tensor(score(checkpoint, evaluation_windows(checkpoint, "builtin", 4, 64)).windows, dtype=torch.float64)
    assert found.perplexity.error == pytest.approx(found.perplexity.value * means.std().item() / 2, rel=1e-6)
    single = measure_text(checkpoint, cut(checkpoint, TextSettings(windows=1, length=64)), None, dtype=torch.float32, device=CPU)
    assert single.perplexity.error is None


def test_a_short_text_gives_fewer_windows(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model")
    file = tmp_path / "short.txt"
    file.write_text(TEXT)
    held = len(build_tokenizer()(TEXT).input_ids)
    windows = cut(open_checkpoint(folder), TextSettings(source=str(file), windows=1000, length=50, stride=20))
    assert len(windows.ids) == (held - 50) // 20 + 1
    file.write_text("A class.")
    with pytest.raises(PlanishError, match=r"short.txt holds \d+ tokens, not one window of 50"):
        cut(open_checkpoint(folder), TextSettings(source=str(file), length=50))


def test_an_empty_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PlanishError, match=r"^--text .*empty\.txt holds no text\."):
        cut(open_checkpoint(saved(tmp_path / "model")[1]), TextSettings(source=str(tmp_path / "empty.txt")))


def test_long_windows_are_scored_in_pieces(tmp_path: Path) -> None:
    """Of 256 predictions each, whose tokens follow one another; alike in both models."""
    model, folder = saved(tmp_path / "model", positions=700)
    base = open_checkpoint(folder)
    windows = cut(base, TextSettings(windows=2, length=600, stride=300))
    hidden = hidden_states(base, windows, dtype=torch.float32, device=CPU)
    found = measure_text(base, windows, BaseHidden(base, hidden), dtype=torch.float32, device=CPU)
    nll, count = reference(model, evaluation_windows(base, "builtin", 2, 600).flatten(), 2, 600, 300)
    assert (found.perplexity.value, found.tokens) == (pytest.approx(math.exp(nll), rel=1e-6), count)
    assert found.base is not None
    assert (found.base.perplexity, found.base.ratio.value) == (found.perplexity.value, 1)


def test_another_vocabulary_and_logits_that_are_no_numbers(tmp_path: Path) -> None:
    """Of either model: neither is a figure."""
    checkpoint = open_checkpoint(saved(tmp_path / "model")[1])
    windows = cut(checkpoint, TextSettings(windows=1, length=32))
    hidden = hidden_states(checkpoint, windows, dtype=torch.float32, device=CPU)
    tiny("llama", changes={"vocab_size": 300}).save_pretrained(tmp_path / "less")
    broken = tiny("llama", changes={"vocab_size": 400})
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    less = BaseHidden(open_checkpoint(tmp_path / "less"), hidden)
    with pytest.raises(PlanishError, match=r"has a vocabulary of 400 and .*less one of 300"):
        measure_text(checkpoint, windows, less, dtype=torch.float32, device=CPU)
    for one, base in ((tmp_path / "broken", checkpoint.path), (checkpoint.path, tmp_path / "broken")):
        with pytest.raises(PlanishError, match="broken: logits are not finite"):
            measure_text(open_checkpoint(one), windows, BaseHidden(open_checkpoint(base), hidden), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "windows is 0, but must be at least 1"),
        ({"length": 1}, "length is 1, but must be at least 2"),
        ({"stride": 0}, "stride is 0, but must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        TextSettings(**settings)  # type: ignore[arg-type]


def test_a_stride_that_leaves_tokens_out(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model")
    with pytest.raises(PlanishError, match="stride is 65, but a window has 64 tokens of text"):
        cut(open_checkpoint(folder), TextSettings(length=64, stride=65))
    with pytest.raises(PlanishError, match="Give at most 63"):
        cut(open_checkpoint(folder), TextSettings(length=64, stride=64, bos="window"))


def test_no_token_for_a_beginning(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(PlanishError, match="bos is window, but"):
        cut(open_checkpoint(folder), TextSettings(length=64, bos="window"))
