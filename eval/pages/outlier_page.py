"""An OutlierReport as a page to read: what was found in words first, then the evidence, then what to do."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

from ...calib.outliers.diagnosis import SCHEMES, Intervention, OutlierReport, SiteFigures, Thresholds
from .markdown import escaped, page_table, points
from .outlier_pictures import View, Views, channels, depth, difficulty_map, errors, landscape, massive_depth, sink_map
from .outlier_view import (
    SCHEME_NAMES,
    TRANSFORM_NAMES,
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
from .page import Card, Code, Column, Links, Page, Part, Table, Words, render, section
from .pictures import DARK, plotly_script

Row = tuple[object, ...]

NO_LINKS: Mapping[str, str] = {}
PUBLISHED = {True: "yes", False: "no", None: None}


def _number(heading: str, note: str = "") -> Column:
    return _quantity(heading, note, number)


def _share(heading: str, note: str = "") -> Column:
    return _quantity(heading, note, percent)


def _quality(heading: str, unit: str) -> Column:
    return _quantity(heading, "", lambda value: quality(value, unit))


def _quantity(heading: str, note: str, show: Callable[[float], str]) -> Column:
    return Column(heading=heading, note=note, numeric=True, show=show)


FIGURES = (
    _number("difficulty", "of channels, ordinary tokens"),
    _number("kurtosis", "3 for a Gaussian"),
    _number("crest", "largest |x| over the root mean square"),
    _number("largest |x|", "of ordinary tokens"),
    _number("with sinks", "largest |x| of all tokens"),
    _number("token ratio", "largest token maximum over the median token's, of all tokens"),
)
BEFORE = (_number("difficulty before"), _number("kurtosis before"), _number("largest |x| before"))


def outlier_page(report: OutlierReport, against: OutlierReport | None = None, links: Mapping[str, str] = NO_LINKS) -> str:
    """The page as one HTML document. against: the base model's report, where `report` is of the compressed one; both are shown side by side.
    links: other pages beside it -> what they are.

    Raises PlanishError if plotly is not installed.
    """
    views = [View("", report)] if against is None else [View(f"now: {report.model}", report), View(f"before: {against.model}", against)]
    sections = (
        section("findings", "Findings", _findings(views)),
        section("worst", "Worst sites", _worst(views)),
        section("massive", "Massive activations", _massive(views)),
        section("interventions", "Interventions", _interventions(views)),
        section("super-weights", "Super weights", _super_weights(views)),
        section("sinks-and-prefix", "Sinks and prefix" if report.quality == "perplexity" else "Sinks", [*_sinks(views), *_prefix(views)]),
        section("sites", "All sites", _sites(views)),
        section("recommendation", "Recommendation", _recommendation(report)),
        section("method", "How it was measured", _method(views)),
        section("links", "See also", [Links(to=links) if links else None]),
    )
    page = Page(
        title=f"Outliers of {report.model}" + (" after compression" if against else ""),
        subtitle=_about(report) + (f" Beside it: {against.model}." if against else ""),
        cards=_cards(report),
        sections=tuple(each for each in sections if each.parts),
        plotly=plotly_script(),
        dark=DARK,
        about=f"inspect: {report.model}",
    )
    return render(page)


def outlier_markdown(report: OutlierReport) -> str:
    """The findings and the worst sites, for a pull request."""
    table = next((part for part in _worst([View("", report)]) if isinstance(part, Table)), None)
    sites = "" if table is None else f"\n{table.caption}:\n\n{page_table(table)}"
    findings = points(report.findings or ("Nothing stands out.",))
    return f"### Outliers of {escaped(report.model)}\n\n{escaped(_about(report))}\n\n{findings}{sites}"


def _about(report: OutlierReport) -> str:
    what = "quantized" if report.compressed else "not quantized"
    text = f"{report.samples} x {report.length} tokens of {report.text}"
    return f"{report.family}, {report.blocks} blocks of width {report.hidden}, {what}; {text}."


def _cards(report: OutlierReport) -> tuple[Card, ...]:
    found = []
    massive = [row for row in report.massive if row.massive]
    largest = max(massive, key=lambda row: abs(row.value), default=None)
    note = f"largest {number(largest.largest)}, channel {largest.channel}" if largest else "none above the thresholds"
    found.append(Card(label="Massive activations", value=str(len(massive)), note=note, target="massive" if report.magnitudes else None))
    if report.sites:
        worst, scheme = worst_first(report)[0], scheme_shown(report)
        hard = hardness(worst, scheme)
        note = f"{percent(hard)} error at {SCHEME_NAMES[scheme]}" if scheme else f"difficulty {number(hard)}"
        found.append(Card(label="Worst site", value=worst.name, note=note, target="worst"))
    layers = ranges(row.layer for row in report.super_weights)
    found.append(Card(label="Super weights", value=str(len(report.super_weights)), note=f"in layer {layers}" if layers else "none found"))
    if report.attention:
        heads = sum(map(len, report.attention.score))
        dormant = sum(head.dormant for head in report.sink_heads)
        share = len(report.sink_heads) / heads if heads else 0.0
        note = f"{share:.0%} of {heads}; {dormant} dormant"
        found.append(Card(label="Sink heads", value=str(len(report.sink_heads)), note=note, target="sinks-and-prefix"))
    if prefix := report.prefix:
        note = _tokens(prefix.token_ids)
        shown = quoted(prefix.text)
        shown = shown[1:-1] if prefix.text == prefix.text.strip() else shown  # quotes where a space would not be seen
        found.append(Card(label="Suggested prefix", value=shown, note=note, target="sinks-and-prefix"))
    if report.recommendation:
        scheme = report.recommendation.scheme.upper()
        note = f"{len(report.recommendation.choices)} choices, each with its reason"
        found.append(Card(label="Recommended", value=scheme, note=note, target="recommendation"))
    return tuple(found)


def _tokens(ids: Sequence[int]) -> str:
    return f"token {ids[0]}" if len(ids) == 1 else f"tokens {', '.join(map(str, ids))}"


def _findings(views: Views) -> Iterable[Part | None]:
    for view in views:
        title = f"{view.name[:1].upper()}{view.name[1:]}"
        yield Words(title=title, lines=view.report.findings or ("Nothing stands out.",), points=True)


def _worst(views: Views) -> Iterable[Part | None]:
    report, scheme = views[0].report, scheme_shown(views[0].report)
    if scheme:
        rows = [_worst_row(site, scheme) for site in worst_first(report)[:10]]
        name = SCHEME_NAMES[scheme]
        columns: tuple[Column, ...] = (
            Column(heading="input of"),
            _share(f"{name} error", "of the output, rounded to nearest, ordinary tokens"),
            _share("all tokens", "the same error with the sink tokens"),
            Column(heading="best transform"),
            _share("error then", "with that transform"),
            _number("kurtosis", "3 for a Gaussian"),
            _number("largest |x|", "of ordinary tokens"),
            _number("with sinks", "largest |x| of all tokens"),
        )
        yield Table(caption=f"The ten hardest sites, by their output error at {name}", columns=columns, rows=tuple(rows))
    elif report.sites:
        rows = [(site.name, *_figures(site), *before) for site, before in zip(worst_first(report)[:10], _befores(views), strict=False)]
        columns = (Column(heading="input of"), *FIGURES, *_before_columns(views))
        yield Table(caption="The ten hardest sites, by difficulty", columns=columns, rows=tuple(rows))
    yield difficulty_map(views)
    yield errors(views)
    yield channels(views)


def _worst_row(site: SiteFigures, scheme: str) -> Row:
    best = best_transform(site, scheme)
    every = site.errors_every.get(scheme, {}).get("plain")
    name, error = (TRANSFORM_NAMES.get(best[0], best[0]), best[1]) if best else (None, None)
    before = site.errors.get(scheme, {}).get("plain")
    return (site.name, before, every, name, error, site.ordinary.kurtosis, site.ordinary.absmax, site.every.absmax)


def _massive(views: Views) -> Iterable[Part | None]:
    for view in views:
        rows = tuple(
            (
                row.channel,
                place(row),
                row.value,
                row.largest,
                row.ratio,
                row.layer,
                life(row, view.report.blocks),
                row.spread,
                "constant" if row.constant else "varies",
                row.share,
                "massive" if row.massive else "large",
            )
            for row in view.report.massive
        )
        columns = (
            Column(heading="channel", numeric=True),
            Column(heading="at"),
            _number("mean value", "over the samples that have it"),
            _number("largest", "of all samples, by magnitude"),
            _number("× median", "over the layer's median |h|"),
            Column(heading="largest after", numeric=True, note="layer"),
            Column(heading="in layers", note="after which it is above the bar of its class in at least half as many samples as in any layer"),
            _share("spread", "standard deviation over samples, as a share of the value"),
            Column(heading="over samples"),
            _share("of samples", "in which it is above the bar of its class"),
            Column(heading="class", note="massive: above massive_floor and massive_ratio times the median; large: above large_ratio times"),
        )
        yield _table(view.name, "Massive and large activations", columns, rows)
    yield depth(views)
    yield massive_depth(views)
    yield landscape(views)


def _interventions(views: Views) -> Iterable[Part | None]:
    for view in views:
        unchanged = unchanged_quality(view.report)
        columns = (
            Column(heading="what was changed", long=True),
            Column(heading="layer", numeric=True),
            _quality(view.report.quality, view.report.quality),
            Column(heading="change", note="from the unchanged model"),
        )
        rows = tuple(_intervention(each, unchanged, view.report.quality) for each in view.report.interventions)
        yield _table(view.name, f"{view.report.quality.capitalize()} when something is changed", columns, rows)


def _intervention(each: Intervention, unchanged: float | None, unit: str) -> Row:
    relative = each.layer is not None and unchanged is not None and unit == "perplexity"
    return (each.name, each.layer, each.quality, change(each.quality, unchanged) if relative and unchanged is not None else None)


def _super_weights(views: Views) -> Iterable[Part | None]:
    if not any(view.report.super_weights for view in views):
        yield Words(lines=("No weight was found at which a spike of down_proj's input and one of its output meet.",))
    columns = (
        Column(heading="weight"),
        Column(heading="row", numeric=True, note="output channel"),
        Column(heading="column", numeric=True, note="input channel"),
        _number("value"),
        _number("input there", "spike at down_proj's input"),
        _number("output there", "spike at down_proj's output"),
        _quality(f"{views[0].report.quality} without it", views[0].report.quality),
        Column(heading="published", note="whether the model's published index lists it; – if it has none"),
    )
    for view in views:
        rows = tuple(
            (row.module, row.row, row.column, row.value, row.activation, row.output, row.quality, PUBLISHED[row.published])
            for row in view.report.super_weights
        )
        yield _table(view.name, "Super weights", columns, rows)


def _sinks(views: Views) -> Iterable[Part | None]:
    yield sink_map(views)
    columns = (
        Column(heading="layer", numeric=True),
        Column(heading="head", numeric=True),
        _number("sink score", "the attention that token 0 gets on average"),
        _number("value drain", "the norm of token 0's value over the median token's"),
        Column(heading="dormant", note="sink score and value drain beyond dormant_score and value_drain"),
    )
    for view in views:
        heads = sorted(view.report.sink_heads, key=lambda head: -head.score)
        rows = tuple((head.layer, head.head, head.score, head.drain, "yes" if head.dormant else "no") for head in heads)
        yield _table(view.name, "Sink heads, the strongest first", columns, rows)


def _prefix(views: Views) -> Iterable[Part | None]:
    columns = (
        Column(heading="token"),
        Column(heading="id", numeric=True),
        Column(heading="samples", numeric=True, note="in which it is an outlier"),
        Column(heading="at position 0", numeric=True, note="samples in which it is an outlier there"),
        Column(heading="elsewhere", numeric=True, note="samples in which it is an outlier at another position"),
        Column(heading="of", numeric=True, note="samples that hold it at another position"),
        _number("× median token", "its maximum over the median token's"),
        Column(heading="worst at"),
    )
    for view in views:
        rows = tuple(
            (quoted(row.text), row.token_id, row.count, row.initial, row.inside, row.present, row.ratio, row.site)
            for row in view.report.outlier_tokens
        )
        yield _table(view.name, "Outlier tokens", columns, rows)
        if prefix := view.report.prefix:
            about = f"{view.name}: the" if view.name else "The"
            yield Words(lines=(f"{about} suggested full-precision prefix is {quoted(prefix.text)} ({_tokens(prefix.token_ids)}).",))


def _sites(views: Views) -> Iterable[Part | None]:
    schemes = [scheme for scheme in SCHEMES if any(scheme in site.errors for site in views[0].report.sites)]
    columns = [
        Column(heading="input of"),
        Column(heading="channels", numeric=True),
        *FIGURES,
        *(_share(f"{SCHEME_NAMES[scheme]} error", "rounded to nearest, ordinary tokens") for scheme in schemes),
        Column(heading="best transform"),
        Column(heading="smoothing", note="whether it costs nothing here"),
        *_before_columns(views),
    ]
    rows = [(*_site_row(site, schemes), *before) for site, before in zip(worst_first(views[0].report), _befores(views), strict=True)]
    yield _table("", "Every site, the hardest first; click a heading to sort", columns, rows)


def _figures(site: SiteFigures) -> Row:
    """What FIGURES shows."""
    figures = site.ordinary
    return (figures.difficulty, figures.kurtosis, figures.crest, figures.absmax, site.every.absmax, site.every.token_ratio)


def _before_columns(views: Views) -> tuple[Column, ...]:
    return BEFORE if len(views) > 1 else ()


def _befores(views: Views) -> list[Row]:
    """What BEFORE shows of every site, the hardest first; empty rows where there is nothing to compare with."""
    names = [site.name for site in worst_first(views[0].report)]
    if len(views) < 2:
        return [()] * len(names)
    base = {site.name: site.ordinary for site in views[1].report.sites}
    return [(base[name].difficulty, base[name].kurtosis, base[name].absmax) if name in base else (None,) * 3 for name in names]


def _site_row(site: SiteFigures, schemes: Sequence[str]) -> Row:
    best = best_transform(site, schemes[-1] if schemes else None)
    return (
        site.name,
        site.channels,
        *_figures(site),
        *(site.errors.get(scheme, {}).get("plain") for scheme in schemes),
        TRANSFORM_NAMES.get(best[0], best[0]) if best else None,
        "free" if site.hosted else "not free",
    )


def _recommendation(report: OutlierReport) -> Iterable[Part | None]:
    if recommended := report.recommendation:
        columns = (Column(heading="choice", long=True), Column(heading="because", long=True))
        yield Table(caption="What is chosen, and why", columns=columns, rows=tuple((each.what, each.why) for each in recommended.choices))
        yield Code(caption=f"The recipe, for {recommended.scheme.upper()}", text=recommended.recipe)


def _method(views: Views) -> Iterable[Part | None]:
    for view in views:
        report = view.report
        name = f"{view.name}: " if view.name else ""
        took = f"{report.seconds:,.0f} s, at most {report.peak_bytes / 1e9:.1f} GB of memory"
        yield Words(lines=(f"{name}{report.samples} samples of {report.length} tokens from {report.text}; {took}.",))
    limits = views[0].report.thresholds
    rows = tuple((item.name, getattr(limits, item.name)) for item in fields(Thresholds))
    yield Table(caption="Criteria", columns=(Column(heading="threshold"), _quantity("value", "", "{:g}".format)), rows=rows)
    yield Words(lines=_criteria(), points=True)


def _criteria() -> tuple[str, ...]:
    """What each threshold means: of the docstring, a line for each group of names."""
    text = " ".join((inspect.getdoc(Thresholds) or "").partition("\n\n")[2].split())
    names = "|".join(item.name for item in fields(Thresholds))
    return tuple(re.split(rf"(?<=\.) (?=(?:(?:{names}), )*(?:{names}):)", text))


def _table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table | None:
    """None where it would be empty."""
    return Table(caption=f"{caption} ({name})" if name else caption, columns=tuple(columns), rows=tuple(rows)) if rows else None
