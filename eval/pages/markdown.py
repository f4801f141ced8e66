"""Markdown as code hosts show it: texts that stay as they are, and tables."""

from collections.abc import Iterable, Sequence

from .page import Table


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return "".join(f"\\{letter}" if letter in "\\|*_<>`[]" else letter for letter in text)


def points(lines: Iterable[str]) -> str:
    """A list, each point a line; nothing of nothing."""
    return "".join(f"- {escaped(line)}\n" for line in lines)


def rows_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    lines = [" | ".join(map(escaped, headings)), " | ".join(["---"] * len(headings)), *(" | ".join(map(escaped, row)) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def page_table(table: Table) -> str:
    """A page's table."""
    return rows_table(
        [column.heading for column in table.columns],
        [[column.text(value) for column, value in zip(table.columns, row, strict=True)] for row in table.rows],
    )
