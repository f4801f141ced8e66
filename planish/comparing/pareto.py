"""Which recipes no other beats, and which one to take for what. A recipe is as good as it is on the text where it is worst."""

from collections.abc import Callable, Mapping, Sequence

from ..common.units import duration, size
from .report import Pick, Row

WITHIN = 0.05  # the rise of perplexity that most will bear
COSTS: Mapping[str, Callable[[Row], float]] = {"size": lambda row: row.bytes, "time": lambda row: row.seconds}
"""What quality is held against."""


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> tuple[str, ...]:
    """The Pareto front: names of the rows that are better (by KL divergence) than every row that costs as much or less, the cheapest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), row.kl)):
        if not found or row.kl < found[-1].kl:
            found.append(row)
    return tuple(row.recipe for row in found)


def picks(rows: Sequence[Row], within: float) -> tuple[Pick, ...]:
    """What to take: the best; the smallest and the quickest whose perplexity rises by no more than `within` on any text; the best that others run."""
    good = [row for row in rows if row.change <= within]
    bound = f"within {100 * within:.3g} % of full precision's perplexity"
    others = [row for row in rows if other_servers(row)]
    return (
        _pick("best", rows, lambda row: row.kl, lambda row: f"KL divergence {row.kl:.4f}, perplexity {row.change:+.1%}, {size(row.bytes)}", ""),
        _pick("smallest", good, lambda row: row.bytes, lambda row: f"{size(row.bytes)}, {row.change:+.1%}, {bound}", _none(rows, bound)),
        _pick("quickest", good, lambda row: row.seconds, lambda row: f"{duration(row.seconds)}, {row.change:+.1%}, {bound}", _none(rows, bound)),
        _pick(
            "portable",
            others,
            lambda row: row.kl,
            lambda row: f"runs in {', '.join(other_servers(row))}; perplexity {row.change:+.1%}, {size(row.bytes)}",
            "none: planish alone runs these.",
        ),
    )


def _pick(need: str, rows: Sequence[Row], by: Callable[[Row], float], why: Callable[[Row], str], none: str) -> Pick:
    """The row with the smallest value, the better one of two with the same."""
    if not rows:
        return Pick(need=need, recipe=None, words=none)
    row = min(rows, key=lambda row: (by(row), row.kl))
    return Pick(need=need, recipe=row.recipe, words=f"{row.recipe}: {why(row)}.")


def other_servers(row: Row) -> list[str]:
    """Who runs it besides planish."""
    return [server for server in row.servers if server != "planish"]


def _none(rows: Sequence[Row], bound: str) -> str:
    nearest = min(rows, key=lambda row: row.change)
    return f"none is {bound}; the nearest is {nearest.recipe}, {nearest.change:+.1%}."
