"""A comparison at the terminal: what it would take, and what it found."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from ..common.fitting import Table
from ..common.units import change, duration, perplexity, size
from .plan import ComparisonPlan, notes
from .report import ComparisonReport, Row
from .text import all_notes, portable, text_words


def comparison_plan_tables(plan: ComparisonPlan, model: str, pending: Sequence[str]) -> tuple[RenderableType, ...]:
    """What every recipe takes, and all of it. pending: recipes that are not done yet."""
    table = _table("recipe", "bits", "checkpoint", "time", "memory", "disk")
    for name, one in plan.plans.items():
        time = duration(one.seconds + plan.measuring) if name in pending else "done"
        table.add_row(f"  {name}", f"{one.bits_per_weight:.2f}", size(one.out_bytes), time, size(plan.memory(name)), size(one.disk))
    seconds = plan.measuring + plan.seconds(pending) if pending else 0.0
    memory = plan.most_memory(pending) + plan.waiting
    about = f"  {model}; {', '.join(f'{text.name} {text.windows} x {text.length} tokens' for text in plan.texts)}"
    everything = (
        f"  about {duration(seconds)} in all, with measuring; about {size(memory)} of memory at most, {size(plan.waiting)} of it this program's"
    )
    return Text(about), "", table, "", Text(everything if pending else "  nothing is left to do"), *_notes(notes(plan))


def comparison_tables(report: ComparisonReport, files: Sequence[Path]) -> tuple[RenderableType, ...]:
    """The table, what to know of it, and the files that were written."""
    texts = [text.name for text in report.texts]
    table = _table("recipe", *(f"{text}\nperplexity, KL" for text in texts), "bits\nsize", "time\nmemory", "runs in planish and")
    base = [Text(f"{perplexity(report.base.perplexity[text])}\n") for text in texts]
    table.add_row("  full precision", *base, f"{report.base.bits}\n{size(report.base.bytes)}", "", "")
    for row in report.rows:
        table.add_row(f"  {row.recipe}", *_cells(row, texts))
    chosen = [Text(f"  {pick.need}: ", style="dim") + Text(pick.words) for pick in report.picks]
    words = Text(f"  {text_words(report)}", style="dim")
    return Text(report.model, style="bold"), "", table, "", *chosen, "", words, *_notes(all_notes(report)), *_paths(files)


def _cells(row: Row, texts: Sequence[str]) -> list[RenderableType]:
    """Two lines each: perplexity with its change and divergence, bits and size, time and memory."""
    found: list[RenderableType] = []
    for text in texts:
        quality = row.quality[text]
        cell = (
            Text(f"{perplexity(quality.perplexity)} ")
            + Text(f"{change(quality.change):>7}", style="dim")
            + Text(f"\nKL {quality.kl:.4f}", style="dim")
        )
        found.append(cell)
    took = f"{duration(row.seconds)}\n{size(row.peak_bytes)}"
    return [*found, f"{row.bits_per_weight:.2f}\n{size(row.bytes)}", took, portable(row)]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        words = f"  {heading}" if i == 0 else heading
        last = heading.startswith("runs in")
        table.add_column(words, justify="left" if i == 0 or last else "right", no_wrap=not last)
    return table


def _notes(lines: Sequence[str]) -> list[RenderableType]:
    return [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in lines]


def _paths(files: Sequence[Path]) -> list[RenderableType]:
    return [Text(f"  {path}") for path in files]
