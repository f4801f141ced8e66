"""Windows of tokens: the same as the tokenizer's own stream, drawn as documented, refused with numbers where there are too few."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import build_tokenizer
from transformers import PreTrainedTokenizerFast

from planish.calib.data import windows as data
from planish.calib.data.documents import builtin, prose
from planish.calib.data.windows import Calibration, tokens, windows
from planish.quant.errors import PlanishError

WORDS = "If the cat sat on the mat, assert it.\n\n= Heading = \n Some  spaces \t and é, 猫, 🐈.\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} {WORDS}" for i in range(40)), encoding="utf-8")
    return path


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_text_in_order_is_the_tokenizers_own_stream(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text_file.read_text(encoding="utf-8"), verbose=False).input_ids
    got = tokens(str(text_file), tokenizer, samples=5, length=48, seed=None)
    assert got.dtype == torch.int64
    assert got.tolist() == [ids[i * 48 : (i + 1) * 48] for i in range(5)]


@pytest.mark.parametrize("per_token", [1, 2, 3, 16])
@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_where_reading_ends_does_not_show(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, samples: int, per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_CHARACTERS_PER_TOKEN", per_token)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), verbose=False).input_ids
    assert tokens(str(text_file), tokenizer, samples=samples, length=31).flatten().tolist() == ids[: samples * 31]


def test_bos_of_the_tokenizer_stands_first(text_file: Path) -> None:
    tokenizer = build_tokenizer(bos=True)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), verbose=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokens(str(text_file), tokenizer, samples=1, length=48).tolist() == [ids[:48]]


def test_all_windows(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text_file.read_text(encoding="utf-8"), verbose=False).input_ids
    assert torch.equal(tokens(str(text_file), tokenizer, samples=None, length=50), windows(torch.tensor(ids), 50))


@pytest.mark.parametrize(("held", "length", "count"), [(0, 3, 0), (2, 3, 0), (3, 3, 1), (10, 3, 3), (12, 3, 4)])
def test_windows_drop_the_rest(held: int, length: int, count: int) -> None:
    got = windows(torch.arange(held), length)
    assert got.shape == (count, length)
    assert got.flatten().tolist() == list(range(count * length))


def test_seed_draws_without_replacement_in_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n\n".join(builtin("all")), encoding="utf-8")
    every = tokens(str(path), tokenizer, samples=None, length=256)
    drawn = tokens(str(path), tokenizer, samples=20, length=256, seed=7)
    chosen = sorted(random.Random(7).sample(range(len(every)), 20))
    assert len(set(chosen)) == 20
    assert torch.equal(drawn, every[chosen])


def test_of_the_builtin_text_the_varied_part_is_drawn_from_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """From 8 characters for each token asked for: of these few, a part of planish's own text; of more, Python's documentation too."""
    own = len(tokenizer("".join(prose()), verbose=False).input_ids) // 64
    every = tokens("builtin", tokenizer, samples=None, length=64)
    drawn = tokens("builtin", tokenizer, samples=8, length=64, seed=0)
    assert all(any(torch.equal(window, one) for window in every[:own]) for one in drawn)
    many = tokens("builtin", tokenizer, samples=len(every) // 2, length=64, seed=0)
    assert any(torch.equal(window, many[-1]) for window in every[own:])


def test_same_seed_same_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (tokens("builtin", tokenizer, samples=8, length=128, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seed_with_every_window_asked_for_is_the_whole_text(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    every = tokens(str(text_file), tokenizer, samples=None, length=64)
    assert torch.equal(tokens(str(text_file), tokenizer, samples=len(every), length=64, seed=3), every)


def test_texts_are_joined_by_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "one cat"}, {"text": "two cats"}, {"text": ""}, {"text": "if"})
    parts = [tokenizer(text).input_ids for text in ("one cat", "two cats", "", "if")]
    expected = [*parts[0], tokenizer.eos_token_id, *parts[1], tokenizer.eos_token_id, *parts[2], tokenizer.eos_token_id, *parts[3]]
    assert tokens(source, tokenizer, samples=1, length=len(expected)).tolist() == [expected]


def test_bos_stands_once(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(bos=True)
    got = tokens(jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}), tokenizer, samples=1, length=4)
    assert got[0, 0] == tokenizer.bos_token_id
    assert got.tolist()[0].count(tokenizer.bos_token_id) == 1


def test_without_eos_texts_follow_one_another(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(eos=False)
    source = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    expected = tokenizer("one").input_ids + tokenizer("two").input_ids
    assert tokens(source, tokenizer, samples=1, length=len(expected)).tolist() == [expected]


def test_conversations_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    roles = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    expected = tokenizer("<s>user: hi</s><s>assistant: yes</s>", add_special_tokens=False).input_ids * 2
    source = jsonl(tmp_path / "chat.jsonl", roles, shared)
    for made in (tokenizer, build_tokenizer(bos=True)):
        assert tokens(source, made, samples=1, length=len(expected)).tolist() == [expected]


def test_conversation_without_template(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(PlanishError, match="no chat template"):
        tokens(source, build_tokenizer(chat=False), samples=1, length=2)


def test_conversation_that_the_template_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "narrator", "content": "hi"}]})
    with pytest.raises(PlanishError, match=r"roles narrator: unknown role narrator"):
        tokens(source, tokenizer, samples=1, length=2)


def test_too_few_windows_are_named_with_numbers(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    count = len(tokens(str(text_file), tokenizer, samples=None, length=64))
    message = f"^calibration.source .*text.txt holds {count} windows of 64 tokens, calibration.samples asks for 4000. Lower samples or length"
    with pytest.raises(PlanishError, match=message):
        tokens(str(text_file), tokenizer, samples=4000, length=64, seed=0)
    with pytest.raises(PlanishError, match=r"^--text builtin holds \d+ windows of 512 tokens, but 4000 are asked for. Lower --length"):
        tokens("builtin", tokenizer, samples=4000, length=512, part="evaluation")


@pytest.mark.parametrize("samples", [1, None])
@pytest.mark.parametrize(("content", "found"), [("", "no text"), ("cat", r"\d tokens, not one window of 64")])
def test_empty_and_short_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: str, found: str, samples: int | None) -> None:
    (tmp_path / "t.txt").write_text(content, encoding="utf-8")
    with pytest.raises(PlanishError, match=f"t.txt holds {found}"):
        tokens(str(tmp_path / "t.txt"), tokenizer, samples=samples, length=64)


def test_a_text_to_measure_on_is_named_by_its_flags(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for content, words in (
        ("", "holds no text. Give a larger text."),
        ("cat", "tokens, not one window of 64. Lower --length, or give a larger text."),
    ):
        (tmp_path / "t.txt").write_text(content, encoding="utf-8")
        with pytest.raises(PlanishError) as caught:
            tokens(str(tmp_path / "t.txt"), tokenizer, samples=None, length=64, part="evaluation")
        assert str(caught.value).startswith(f"--text {tmp_path / 't.txt'} holds ")
        assert str(caught.value).endswith(words)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rows", [(), ({"text": ""}, {"text": ""})])
def test_rows_without_text(tmp_path: Path, rows: tuple[object, ...], bos: bool) -> None:
    with pytest.raises(PlanishError, match="holds no text"):
        tokens(jsonl(tmp_path / "t.jsonl", *rows), build_tokenizer(bos=bos), samples=1, length=2)


def test_only_as_much_as_needed_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_DRAWN_FROM", 100)
    rows: list[object] = [{"text": WORDS}] * 50
    source = jsonl(tmp_path / "a.jsonl", *rows)
    with Path(source).open("a", encoding="utf-8") as file:
        file.write("not JSON, and never read\n")
    assert tokens(source, tokenizer, samples=2, length=16, seed=0).shape == (2, 16)
    with pytest.raises(PlanishError, match=r"a.jsonl:51"):
        tokens(source, tokenizer, samples=200, length=16, seed=0)


@pytest.mark.parametrize("limit", [1, 100, 1141, 1142, 5000])
def test_reading_less_changes_nothing_in_order(limit: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens("builtin", tokenizer, samples=6, length=32, seed=None)
    monkeypatch.setattr(data, "_DRAWN_FROM", limit)
    monkeypatch.setattr(data, "_CHARACTERS_PER_TOKEN", 1)
    assert torch.equal(tokens("builtin", tokenizer, samples=6, length=32, seed=None), expected)


def test_more_is_read_where_text_makes_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    monkeypatch.setattr(data, "_DRAWN_FROM", 10)
    monkeypatch.setattr(data, "_CHARACTERS_PER_TOKEN", 1)
    (tmp_path / "t.txt").write_text("if the assert " * 200, encoding="utf-8")
    every = tokens(str(tmp_path / "t.txt"), tokenizer, samples=None, length=4)
    assert torch.equal(tokens(str(tmp_path / "t.txt"), tokenizer, samples=len(every), length=4), every)


def test_calibration_asks_for_its_own_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    calibration = Calibration(samples=3, length=32, seed=5)
    assert torch.equal(calibration.tokens(tokenizer), tokens("builtin", tokenizer, samples=3, length=32, seed=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ""}, "calibration.source is empty"),
        ({"samples": 0}, "calibration.samples is 0, but must be at least 1"),
        ({"length": 1}, "calibration.length is 1, but must be at least 2"),
        ({"batch_size": 0}, "calibration.batch_size is 0"),
        ({"seed": -1}, "calibration.seed is -1, but must be at least 0, or null"),
        ({"seed": 2**63}, "calibration.seed is 9223372036854775808, but must be at most 9223372036854775807"),
    ],
)
def test_impossible_calibration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        Calibration(**settings)
