"""What `planish search` found, on one screen: each block's formats, what they take and cost, and single formats beside that."""

from collections import Counter
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from ..common.fitting import Table
from ..common.units import duration, size
from .search import SearchResult

DEAREST = 5  # sites that are named


def search_tables(found: SearchResult, out: Path) -> tuple[RenderableType, ...]:
    """What to print, one below the other. out: the recipe's file."""
    about = f"{found.bits_per_weight:.3f} bits per weight, {size(found.bytes)}, about {found.speedup:.2f} times as quick in writing text"
    costs = f"expected divergence {found.cost:.4f} nats per token"
    took = f"  measured on {found.tokens} tokens in {duration(found.seconds)}"
    return (
        Text(found.recipe.name, style="bold"),
        f"  {about}",
        f"  {costs}",
        "",
        _blocks(found),
        "",
        _uniform(found),
        "",
        _dearest(found),
        took,
        f"  {out}",
    )


def _blocks(found: SearchResult) -> Table:
    """A row a block, a column a site."""
    chosen = {(site.block, site.site): name for site, name in zip(found.sites, found.chosen, strict=True)}
    names = list(dict.fromkeys(site.site for site in found.sites))
    table = _table("  block", *names, left=range(1, len(names) + 1))
    for block in dict.fromkeys(site.block for site in found.sites):
        table.add_row(f"  {block}", *(chosen.get((block, name), "–") for name in names))
    return table


def _uniform(found: SearchResult) -> Table:
    table = _table("  format", "sites", "everywhere: bits", "expected divergence")
    counts = Counter(found.chosen)
    for name in dict.fromkeys(name for site in found.sites for name in site.options):
        bits, cost = found.uniform.get(name, (None, None))
        table.add_row(f"  {name}", str(counts[name]), "–" if bits is None else f"{bits:.3f}", "–" if cost is None else f"{cost:.4f}")
    table.add_row("  chosen", str(len(found.sites)), f"{found.bits_per_weight:.3f}", f"{found.cost:.4f}", style="bold")
    return table


def _dearest(found: SearchResult) -> Text:
    """The sites where most of the divergence is left."""
    costs = sorted(((site.options[name].cost, site, name) for site, name in zip(found.sites, found.chosen, strict=True)), key=lambda row: -row[0])
    return Text("  most is left at " + ", ".join(f"{site.block}.{site.site} ({name}: {cost:.4f})" for cost, site, name in costs[:DEAREST]))


def _table(*headings: str, left: range = range(0)) -> Table:
    """Numbers to the right, but for the first column and those of `left`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index in (0, *left) else "right", no_wrap=True)
    return table
