"""Progress: plain lines, live bars, the time that is left; figures as people read them."""

import io

import pytest
from rich.console import Console

from planish.common.units import duration, size
from planish.terminal import progress
from planish.terminal.progress import Live, Plain, Stage, showing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def plain() -> tuple[Plain, io.StringIO]:
    text = io.StringIO()
    return Plain(Console(file=text, width=200)), text


def test_plain_lines(clock: list[float]) -> None:
    shown, text = plain()
    shown.say("a [note] of the plan")
    shown.stage("blocks", 3)
    for i in range(3):
        clock[0] += 20
        shown.step(i + 1, f"error 0.{i}")
    assert text.getvalue().splitlines() == [
        "a [note] of the plan",
        "blocks",
        "blocks 1/3, error 0.0, 40 s left",
        "blocks 2/3, error 0.1, 20 s left",
        "blocks 3/3, error 0.2, 1 min 00 s",
    ]


def test_steps_with_nothing_to_say_are_few(clock: list[float]) -> None:
    shown, text = plain()
    shown.stage("reading", 10**6)
    for i in range(100):
        clock[0] += 0.25
        shown.step((i + 1) * 10**4)
    assert text.getvalue().splitlines() == ["reading", "reading 41 %", "reading 82 %", "reading 100 %, 25 s"]


def test_time_left_after_a_resumed_start(clock: list[float]) -> None:
    """Quick steps at first, which were done in an earlier run, are soon outweighed."""
    stage = Stage("blocks", 30)
    assert stage.left() is None
    for i in range(20):
        clock[0] += 0.1 if i < 10 else 10
        stage.step(i + 1)
    assert stage.left() == pytest.approx(100)


def test_time_left_where_many_steps_come_at_once(clock: list[float]) -> None:
    stage = Stage("divergence", 1000)
    for done in (32, 64, 96):
        clock[0] += 8
        stage.step(done)
    assert stage.left() == pytest.approx(904 / 4)


def test_live() -> None:
    text = io.StringIO()
    with showing(Console(file=text, force_terminal=True, width=100, color_system=None)) as shown:
        assert isinstance(shown, Live)
        shown.say("a [note] of the plan")
        shown.stage("blocks", 2)
        shown.step(1, "error [0.1]")
        shown.step(2, "error [0.2]")
        shown.stage("writing", 10**6)
        shown.step(10**6)
    last = text.getvalue().split("\n")[-4:-2]
    assert all(words in last[0] for words in ("✓ blocks", "2/2", "error [0.2]"))
    assert all(words in last[1] for words in ("✓ writing", "100 %"))
    assert "a [note] of the plan" in text.getvalue()


def test_no_terminal_is_plain() -> None:
    with showing(Console(file=io.StringIO())) as shown:
        assert isinstance(shown, Plain)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min"), (11400, "3 h 10 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (164_900_000, "164.9 MB"), (5e9, "5.0 GB"), (7e12, "7.0 TB")]
)
def test_size(count: float, words: str) -> None:
    assert size(count) == words
