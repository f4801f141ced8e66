"""Tables at the terminal: where there is no room for one it is a list, and no word is cut."""

import io
from collections.abc import Sequence

import pytest
import rich.table
from helpers_inspect import smollm2_report
from helpers_reports import comparison_report, evaluation
from rich.console import Console, RenderableType

from planish.common.fitting import WORDS, Table
from planish.comparing.tables import comparison_tables
from planish.evaluating.tables import evaluation_tables
from planish.inspecting.tables import inspect_tables

FIRST = {"recipe", "text", "task,", "worst", "sites"}  # headings of first columns, which lists do without


def shown(parts: Sequence[RenderableType], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*parts, sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def small(kind: type[rich.table.Table]) -> rich.table.Table:
    table = kind(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("recipe", "builtin\nperplexity", ""):
        table.add_column(heading, no_wrap=True)
    table.add_row("w8a8", "9.85\n+0.6 %", "runs")
    table.add_row("a-long-name", "", "")
    return table


@pytest.mark.parametrize("width", [29, 80])
def test_with_room_it_is_a_table(width: int) -> None:
    """Of 11, 10 and 4 columns, with 2 between them: 29."""
    assert shown([small(Table)], width) == shown([small(rich.table.Table)], width)


def test_without_room_it_is_a_list() -> None:
    lines = shown([small(Table)], 28).splitlines()
    assert [line.rstrip() for line in lines] == ["w8a8", "    builtin, perplexity:", "    9.85, +0.6 %", "    runs", "a-long-name"]


@pytest.mark.parametrize("width", [30, 40, 50])
def test_no_word_is_cut(width: int) -> None:
    report = smollm2_report()
    for parts in (
        comparison_tables(comparison_report(), []),
        evaluation_tables(evaluation()),
        inspect_tables(report),
        inspect_tables(report, report),
    ):
        narrow, wide = (shown(parts, columns) for columns in (width, 1000))
        assert "…" not in narrow
        assert max(map(len, narrow.splitlines())) <= width
        words = {word for word in wide.split() if len(word) <= WORDS} - FIRST
        assert not {word for word in words if word not in narrow}
