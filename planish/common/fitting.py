"""Tables that become lists where the terminal is too narrow for them, so that no word is cut."""

from collections.abc import Iterator

from rich import table
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text

WORDS = 20  # columns of text that are wrapped: narrower than this, or than their longest word, they cannot be read
INDENT = 4


class Table(table.Table):
    """rich's table. Where it is wider than the terminal a list: each row's first cell, and below it the others with their headings."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or the list."""
        if self._least(console) <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._list()

    def _least(self, console: Console) -> int:
        """Columns of the terminal that it takes at least."""
        _, right, _, left = self.padding
        total = 0
        for column in self.columns:
            cells = [*([column.header] if self.show_header else []), *column.cells]
            measured = [console.measure(cell) for cell in cells]
            total += max((one.maximum if column.no_wrap else min(one.minimum, WORDS) for one in measured), default=0)
        return total + (len(self.columns) - 1) * (left + right)

    def _list(self) -> Iterator[RenderableType]:
        headings = [_line(column.header) for column in self.columns]
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            yield _line(first)
            for heading, cell in zip(headings[1:], map(_line, others), strict=True):
                if cell:
                    yield Padding(heading + Text(": ") + cell if self.show_header and heading else cell, (0, 0, 0, INDENT), expand=False)


def _line(cell: RenderableType) -> Text:
    """A cell on one line: its own ones are put side by side."""
    text = cell if isinstance(cell, Text) else Text(str(cell))
    return Text(", ").join(line for line in text.split("\n") if line)
