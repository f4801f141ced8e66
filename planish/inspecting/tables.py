"""What `planish inspect` found, on one screen: findings in words, the worst sites, one line for everything else."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from ..calib.outliers.diagnosis import OutlierReport, SiteFigures
from ..common.fitting import Table
from ..common.units import duration, size
from ..eval.pages.outlier_view import (
    SCHEME_NAMES,
    best_transform,
    change,
    hardness,
    life,
    number,
    percent,
    place,
    quality,
    quoted,
    ranges,
    scheme_shown,
    unchanged_quality,
    worst_first,
)

SHORT = {"plain": "nothing", "smooth": "smooth", "hadamard": "Hadamard", "both": "smooth+Hadamard"}
FINDINGS = 4  # at most, so that it is one screen
WORST = 6
NAMED = 3  # massive activations, super weights and interventions that are named
CHOICES = 3


def inspect_tables(report: OutlierReport, against: OutlierReport | None = None, files: Sequence[Path] = ()) -> tuple[RenderableType, ...]:
    """What to print, one below the other. against: the base model's report, beside which the compressed model's is shown. files: written ones."""
    reports = [report] if against is None else [report, against]
    about = f"{report.family}, {report.blocks} blocks of width {report.hidden}; {report.samples} x {report.length} tokens of {report.text}"
    return (
        Text(report.model, style="bold") + Text(f"  {about}", style="not bold dim"),
        "",
        *_findings(report.findings),
        "",
        *_worst(reports),
        _facts(reports),
        *_recommendation(report),
        *(Text(f"  {path}") for path in files),
    )


def _findings(sentences: Sequence[str]) -> Iterator[RenderableType]:
    table = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences[:FINDINGS] or ("Nothing stands out.",):
        table.add_row("  •", Text(sentence))
    yield table
    if len(sentences) > FINDINGS:
        yield Text(f"    and {len(sentences) - FINDINGS} more, in the page of --html and in --json", style="dim")


def _worst(reports: Sequence[OutlierReport]) -> Iterator[RenderableType]:
    """The hardest sites: with their errors where they were measured, else with their figures; and those of the base model."""
    report = reports[0]
    sites, scheme = worst_first(report)[:WORST], scheme_shown(report)
    if not sites:
        return
    yield _compared(sites, reports[1]) if len(reports) > 1 else _errors(sites, scheme) if scheme else _plain(sites)
    yield ""


def _errors(sites: Sequence[SiteFigures], scheme: str) -> Table:
    name = SCHEME_NAMES[scheme]
    table = _table("  worst sites", f"{name} error", "best after", "then", "kurtosis", "max |x|", "with sinks", left=(2,))
    for site in sites:
        best = best_transform(site, scheme)
        what, then = ("–", "–") if best is None else (SHORT[best[0]], percent(best[1]))
        ordinary = site.ordinary
        cells = (percent(hardness(site, scheme)), what, then, number(ordinary.kurtosis), number(ordinary.absmax), number(site.every.absmax))
        table.add_row(f"  {site.name}", *cells)
    return table


def _plain(sites: Sequence[SiteFigures]) -> Table:
    table = _table("  worst sites", "difficulty", "kurtosis", "max |x|", "with sinks")
    for site in sites:
        figures = site.ordinary
        table.add_row(f"  {site.name}", *map(number, (figures.difficulty, figures.kurtosis, figures.absmax, site.every.absmax)))
    return table


def _compared(sites: Sequence[SiteFigures], base: OutlierReport) -> Table:
    before = {site.name: site.ordinary for site in base.sites}
    table = _table("  worst sites", "difficulty", "before", "kurtosis", "before", "max |x|", "before")
    for site in sites:
        now, then = site.ordinary, before.get(site.name)
        rows = [("–",) * 3 if each is None else tuple(map(number, (each.difficulty, each.kurtosis, each.absmax))) for each in (now, then)]
        table.add_row(f"  {site.name}", *chain.from_iterable(zip(*rows, strict=True)))
    return table


def _table(*headings: str, left: Iterable[int] = ()) -> Table:
    """Numbers to the right, but for the first column and those of `left`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index in (0, *left) else "right", no_wrap=True)
    return table


def _facts(reports: Sequence[OutlierReport]) -> Table:
    """One row a matter; a column for each report."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=len(reports) > 1)
    for heading in ("", "now", "before")[: len(reports) + 1]:
        table.add_column(
            heading, style="" if heading else "dim", no_wrap=not heading, overflow="fold", ratio=1 if heading and len(reports) > 1 else None
        )
    facts = [dict(_matters(report)) for report in reports]
    for matter in facts[0]:
        table.add_row(f"  {matter}", *(Text(found[matter]) for found in facts))
    return table


def _matters(report: OutlierReport) -> Iterator[tuple[str, str]]:
    yield "massive", _massives(report)
    yield "if changed", _changes(report)
    yield "super weights", _several([_super_weight(report, index) for index in range(len(report.super_weights))], NAMED)
    yield "sink heads", _sinks(report)
    if report.quality == "perplexity":
        yield "prefix", _prefix(report)
    yield "took", f"{duration(report.seconds)}, peak memory {size(report.peak_bytes)}"


def _prefix(report: OutlierReport) -> str:
    if report.prefix is None:
        return "none suggested" if report.outlier_tokens else "none needed"
    ids = report.prefix.token_ids
    return f"{quoted(report.prefix.text)} (id{'s' * (len(ids) > 1)} {', '.join(map(str, ids))})"


def _massives(report: OutlierReport) -> str:
    """The massive ones, which stand first, and how many are only large."""
    count = sum(row.massive for row in report.massive)
    named = _several([_massive(report, index) for index in range(count)], NAMED)
    return f"{named}; {len(report.massive) - count} large" if count < len(report.massive) else named


def _several(texts: Sequence[str], most: int) -> str:
    more = f"; {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more if texts else "none"


def _massive(report: OutlierReport, index: int) -> str:
    """The first in full, of the others what is different."""
    row, before = report.massive[index], report.massive[index - 1] if index else None
    where = f" at {place(row)}" if before is None or (row.position, row.token) != (before.position, before.token) else ""
    lives = f", layers {life(row, report.blocks)}" if before is None or (row.born, row.died) != (before.born, before.died) else ""
    kind = f", {'constant' if row.constant else 'depends on the input'}" if before is None or row.constant != before.constant else ""
    most = f" (at most {number(row.largest)})" if before is None else ""
    return f"channel {row.channel}: {number(row.value)}{most}{where}{lives}{kind}"


def _changes(report: OutlierReport) -> str:
    """Perplexity 20.25; ... set to zero (layer 11) 6,180 (× 305)."""
    unchanged = unchanged_quality(report)
    if unchanged is None:
        return "not measured"
    own = tuple(f"{row.module}[" for row in report.super_weights)  # these are told where the weight is
    texts = []
    for each in report.interventions:
        if each.layer is not None and not each.name.startswith(own):
            relative = f" ({change(each.quality, unchanged)})" if report.quality == "perplexity" else ""
            texts.append(f"{each.name} (layer {each.layer}): {quality(each.quality, report.quality)}{relative}")
    if not texts and report.quality != "perplexity":
        return "nothing to change"
    start = f"{report.quality} {quality(unchanged, report.quality)}" if report.quality == "perplexity" else report.quality
    return "; ".join([start, _several(texts, NAMED)] if texts else [start])


def _super_weight(report: OutlierReport, index: int) -> str:
    row = report.super_weights[index]
    text = f"{row.module}[{row.row}, {row.column}] = {number(row.value)}"
    return text if row.quality is None else f"{text} ({report.quality} {quality(row.quality, report.quality)} without it)"


def _sinks(report: OutlierReport) -> str:
    if report.attention is None:
        return "not measured"
    if not report.sink_heads:
        return "none"
    heads = sum(map(len, report.attention.score))
    by_layer = Counter(head.layer for head in report.sink_heads)
    most = [layer for layer, count in by_layer.items() if 2 * count > len(report.attention.score[layer])]
    text = f"{len(report.sink_heads)} of {heads}, {sum(head.dormant for head in report.sink_heads)} dormant"
    return f"{text}; most heads of layers {ranges(most)}" if most else text


def _recommendation(report: OutlierReport) -> Iterator[RenderableType]:
    if recommended := report.recommendation:
        yield ""
        yield Text("  recommended ", style="dim") + Text(recommended.scheme.upper(), style="bold")
        table = Table.grid(padding=(0, 1, 0, 0))
        for each in recommended.choices[:CHOICES]:
            table.add_row("•", Text(f"{each.what}: {each.why}"))
        yield Padding(table, (0, 0, 0, 2))
        if len(recommended.choices) > CHOICES:
            yield Text(f"    and {len(recommended.choices) - CHOICES} more", style="dim")
