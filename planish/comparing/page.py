"""A comparison as a page: which recipe for what, pictures of quality against size and time, the whole table."""

from collections.abc import Callable, Iterator, Mapping

from ..common.units import change, duration, perplexity, size
from ..eval.pages.page import Card, Column, Links, Page, Part, Picture, Table, Words, render, section
from ..eval.pages.scatter import NARROW, scatter
from .report import ComparisonReport, Row
from .text import QUALITY, all_notes, made_words, panels, text_words

NEEDS = {"best": "Best", "smallest": "Smallest", "quickest": "Quickest", "portable": "Portable"}


def comparison_page(report: ComparisonReport, links: Mapping[str, str]) -> str:
    """The page as one HTML document, which needs no plotting library. links: other pages beside it -> what they are."""
    about = f"{len(report.rows)} recipes on {report.family}, {report.blocks} blocks; {text_words(report)}."
    chosen = tuple(f"{NEEDS.get(pick.need, pick.need)}: {pick.words}" for pick in report.picks)
    sections = (
        section("picks", "Which to take", [Words(lines=chosen, points=True)]),
        section("front", "Quality against size and time", [_pictures(report)]),
        section("recipes", "All recipes", _tables(report)),
        section("notes", "Notes", [Words(lines=tuple(all_notes(report)), points=True) if all_notes(report) else None]),
        section("method", "How it was made", [Words(lines=(made_words(report),))]),
        section("links", "See also", [Links(to=links) if links else None]),
    )
    return render(
        Page(
            title=f"Recipes on {report.model}",
            subtitle=about,
            cards=tuple(_card(report, pick.need, pick.recipe) for pick in report.picks),
            sections=tuple(each for each in sections if each.parts),
            about=f"compare: {report.model}",
        )
    )


def _card(report: ComparisonReport, need: str, name: str | None) -> Card:
    row = next((row for row in report.rows if row.recipe == name), None)
    note = "none" if row is None else f"{change(row.change)} perplexity, {size(row.bytes)}, {duration(row.seconds)}"
    return Card(label=NEEDS.get(need, need), value=name or "–", note=note, target="picks")


def _pictures(report: ComparisonReport) -> Part:
    texts = [text.name for text in report.texts]
    svgs = tuple(scatter(f"{QUALITY} against {panel.x}", QUALITY, texts, [panel], heading=False) for panel in panels(report, NARROW))
    return Picture(
        caption="Lower and further left is better. Dashed: the recipes that no other beats in both, by the text where each is worst.",
        svgs=svgs,
    )


def _tables(report: ComparisonReport) -> Iterator[Part]:
    texts = [text.name for text in report.texts]
    columns = [Column(heading="recipe")]
    for text in texts:
        columns += [
            _quantity(f"{text}: perplexity", "", perplexity),
            _quantity("change", "against full precision", change),
            _quantity("KL", "mean divergence from full precision, nats per token", lambda value: f"{value:.4f}"),
            _quantity("same token", "share of tokens for which both models find the same next one likeliest", lambda value: f"{value:.1%}"),
        ]
    columns += [
        _quantity("bits", "of a quantized weight as it is stored, scales included", lambda value: f"{value:.2f}"),
        _quantity("size", "of all weights", size),
        _quantity("time", "to compress, in a process of its own", duration),
        _quantity("memory", "the compressing process at its highest", size),
        Column(heading="no other beats", note="in quality and this at once"),
        Column(heading="runs in"),
    ]
    base: list[object] = ["(full precision)"]
    for text in texts:
        base += [report.base.perplexity[text], None, None, None]
    base += [float(report.base.bits), report.base.bytes, None, None, None, None]
    rows = (tuple(base), *(_row(report, row, texts) for row in report.rows))
    yield Table(caption="Click a heading to sort", columns=tuple(columns), rows=rows)


def _row(report: ComparisonReport, row: Row, texts: list[str]) -> tuple[object, ...]:
    cells: list[object] = [row.recipe]
    for text in texts:
        quality = row.quality[text]
        cells += [quality.perplexity, quality.change, quality.kl, quality.agreement]
    fronts = ", ".join(what for what, names in report.fronts.items() if row.recipe in names)
    return (*cells, row.bits_per_weight, row.bytes, row.seconds, row.peak_bytes, fronts or None, ", ".join(row.servers))


def _quantity(heading: str, note: str, show: Callable[[float], str]) -> Column:
    return Column(heading=heading, note=note, numeric=True, show=show)
