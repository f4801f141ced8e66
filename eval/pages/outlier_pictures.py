"""The figures of an OutlierReport. Each takes one report, or two whose plots stand side by side with the same scales, and None is given where there
is nothing to draw."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from ...calib.outliers.diagnosis import SCHEMES, TRANSFORMS, Figures, Landscape, OutlierReport, SiteFigures
from .outlier_view import SCHEME_NAMES, TRANSFORM_NAMES, worst_first
from .page import Control, Figure, Frame, Pane
from .pictures import (
    GREY,
    NUMBER,
    VERMILION,
    Grid,
    Trace,
    axis,
    colour_axis,
    heat,
    keyed,
    label,
    layout,
    limits,
    line,
    log_axis,
    note,
    packed_heat,
    packed_line,
    plain,
)

MEASURES = {
    "difficulty": "difficulty",
    "kurtosis": "kurtosis",
    "crest": "crest factor",
    "absmax": "largest |x|",
    "token_ratio": "largest token / median token",
}
PANELS = {"plain": "plain", "smooth": "smooth", "hadamard": "Hadamard", "both": "both"}
TOKENS = {"ordinary": "ordinary tokens", "every": "all tokens"}


class View(NamedTuple):
    """A report and what its plots are called; without a name where it stands alone."""

    name: str
    report: OutlierReport


Views = Sequence[View]


def difficulty_map(views: Views) -> Figure | None:
    """Layer x site: how hard the inputs are, by any of the measures."""
    if not any(view.report.sites for view in views):
        return None
    panes = []
    choices = list(product(MEASURES, TOKENS))
    scales = [limits([_grid(view, _measure(*choice)) for view in views], log=True) for choice in choices]
    for view in views:
        frames = {}
        for index, (choice, scale) in enumerate(zip(choices, scales, strict=True)):
            measure = MEASURES[choice[0]]
            hover = f"layer %{{x}}, %{{y}}<br>{measure} %{{customdata:{NUMBER}}}"
            trace = heat(_layers(view), _sites(view), _grid(view, _measure(*choice)), log=True, hover=hover)
            key = f"{index // len(TOKENS)}-{index % len(TOKENS)}"
            frames[key] = Frame(data=(trace,), layout={"coloraxis": colour_axis(*scale, f"{measure} (log)", log=True)})
        panes.append(Pane(title=view.name, layout=_map_layout("layer", "input of", colour_axis(1, 10, "", log=True)), frames=frames))
    return Figure(
        name="difficulty",
        title="How hard each site is",
        caption="Inputs of the quantized layers. Difficulty is the standard deviation of the channels' magnitudes; ordinary tokens are those without "
        f"a massive activation{'' if _vision(views) else ' and beyond position 0'}, and what is bright only for all tokens is the sinks' doing.",
        panes=tuple(panes),
        controls=(Control(label="measure", options=tuple(MEASURES.values())), Control(label="over", options=tuple(TOKENS.values()))),
        height=300,
    )


def depth(views: Views) -> Figure | None:
    """Magnitude of the hidden states along depth."""
    if not any(view.report.magnitudes for view in views):
        return None
    every = [value for view in views for row in view.report.magnitudes for value in (*row.top[:2], row.median)]
    return Figure(
        name="depth",
        title="Magnitude along depth",
        caption="The largest, the second largest and the median |h| after each layer. Above the grey line a value is massive.",
        panes=tuple(
            Pane(title=view.name, layout=layout(_depth_axis(view), log_axis("|h|", every), legend=True), frames={"": _depth(view)}) for view in views
        ),
    )


def _depth(view: View) -> Frame:
    rows, limit = view.report.magnitudes, view.report.thresholds
    layers = [row.layer for row in rows]
    lines = {"largest": [row.top[0] for row in rows], "second": [row.top[1] for row in rows], "median": [row.median for row in rows]}
    hover = f"layer %{{x}}<br>%{{fullData.name}} %{{y:{NUMBER}}}"
    floor = [max(limit.massive_floor, limit.massive_ratio * row.median) for row in rows]
    threshold = {**line(layers, floor, "massive above", 0, hover), "mode": "lines", "line": {"color": GREY, "width": 1.5}}
    return Frame(data=(*(line(layers, values, name, index, hover) for index, (name, values) in enumerate(lines.items())), threshold))


def massive_depth(views: Views) -> Figure | None:
    """Where the massive and large channels are born and die: at most 5 of them."""
    if not any(view.report.massive for view in views):
        return None
    every = [abs(value) for view in views for row in view.report.massive[:5] for value in row.by_layer]
    panes = []
    for view in views:
        traces = []
        for index, row in enumerate(view.report.massive[:5]):
            where = ", varying positions" if row.position is None else f", position {row.position}"
            hover = f"layer %{{x}}<br>channel {row.channel}{where}: %{{customdata:{NUMBER}}}"
            layers = range(-1, len(row.by_layer) - 1)
            trace = line(layers, [abs(value) or None for value in row.by_layer], f"channel {row.channel}{where}", index, hover)
            traces.append({**trace, "customdata": [value if math.isfinite(value) else None for value in row.by_layer]})
        shape = layout(_depth_axis(view), log_axis("|h|", every), legend=True)
        panes.append(Pane(title=view.name, layout=shape, frames={"": _or_note(traces, "no massive activation")}))
    return Figure(
        name="massive-depth",
        title="Birth and death of massive activations",
        caption="The mean value at these tokens after each layer, of the five that stand out most; the sign is shown on hovering.",
        panes=tuple(panes),
    )


def landscape(views: Views) -> Figure | None:
    """|h| over tokens and channels, layer by layer."""
    first = views[0].report.landscapes
    if not first:
        return None
    low, high = limits([[row for each in view.report.landscapes for row in each.values] for view in views], log=True)
    colours = colour_axis(max(low, high / 1e6), high, "|h| (log)", log=True)
    panes = []
    for view in views:
        found = {each.layer: each for each in view.report.landscapes}
        frames = {}
        for index, each in enumerate(first):
            frames[str(index)] = _landscape(found[each.layer], view.report) if each.layer in found else _or_note([], "no picture")
        shape = layout(axis("channel", showgrid=False), axis("token", showgrid=False, type="category", nticks=24), colours=colours)
        panes.append(Pane(title=view.name, layout=shape, frames=frames))
    names = tuple("embeddings" if each.layer < 0 else f"layer {each.layer}" for each in first)
    start = max(range(len(first)), key=lambda index: max((max(row, default=0.0) for row in first[index].values), default=0.0))
    return Figure(
        name="landscape",
        title="Tokens and channels",
        caption="|h| of one sample after the layer chosen; a column is the largest of a few neighbouring channels, a ring "
        "stands around what is massive. The scale is the same for all layers.",
        panes=tuple(panes),
        controls=(Control(label="after", options=names, start=start, slider=True),),
        height=520,
    )


def _landscape(each: Landscape, report: OutlierReport) -> Frame:
    edges = [*each.channels, each.width]
    spans = [str(first) if last - first == 1 else f"{first}–{last - 1}" for first, last in pairwise(edges)]
    tokens = [f"{position} {plain(_short(token))}".strip() for position, token in zip(each.positions, each.tokens, strict=True)]
    hover = f"token %{{y}}<br>channel %{{customdata[1]}}<br>|h| %{{customdata[0]:{NUMBER}}}"
    picture = packed_heat([edge - 0.5 for edge in edges], tokens, each.values, spans, hover=hover)
    ranges = {"xaxis.range": [-0.5, each.width - 0.5], "yaxis.range": [len(tokens) - 0.5, -0.5]}
    return Frame(data=(picture, _rings(each, tokens, report)), layout=ranges)


def _rings(each: Landscape, tokens: Sequence[str], report: OutlierReport) -> Trace:
    """Around what is massive."""
    median = next((row.median for row in report.magnitudes if row.layer == each.layer), math.inf)
    bar = max(report.thresholds.massive_floor, report.thresholds.massive_ratio * median)
    edges = [*each.channels, each.width]
    found = [(row, column) for row, values in enumerate(each.values) for column, value in enumerate(values) if value >= bar]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [(edges[column] + edges[column + 1] - 1) / 2 for _, column in found],
        "y": [tokens[row] for row, _ in found],
        "marker": {"symbol": "circle-open", "size": 13, "color": VERMILION, "line": {"width": 2}},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _depth_axis(view: View) -> dict[str, object]:
    return axis("after layer (−1: embeddings)", range=[-1.5, view.report.blocks - 0.5])


def _short(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:17]}…"


def sink_map(views: Views) -> Figure | None:
    """Layer x head: the sink score, and the value drain."""
    if not any(view.report.attention for view in views):
        return None
    measures = {"score": "sink score", "drain": "value drain"}
    first = "the class token" if _vision(views) else "token 0"
    drains = [view.report.attention.drain for view in views if view.report.attention]
    scales = {"score": (0.0, 1.0), "drain": (0.0, max(1.0, limits(drains, log=False)[1]))}
    panes = []
    for view in views:
        frames = {}
        for index, (measure, title) in enumerate(measures.items()):
            by_layer = getattr(view.report.attention, measure, ())
            heads = range(max((len(row) for row in by_layer), default=0))
            grid = [[row[head] if head < len(row) else None for row in by_layer] for head in heads]
            trace = heat(range(len(by_layer)), heads, grid, log=False, hover=f"layer %{{x}}, head %{{y}}<br>{title} %{{z:.3f}}")
            colours = {"coloraxis": colour_axis(*scales[measure], title, log=False)}
            frames[str(index)] = Frame(data=(trace,), layout=colours) if grid else _or_note([], "not measured")
        panes.append(Pane(title=view.name, layout=_map_layout("layer", "head", colour_axis(0, 1, "", log=False)), frames=frames))
    return Figure(
        name="sinks",
        title="Sink heads",
        caption=f"Sink score: the attention that {first} gets from the head's queries on average. Value drain: the norm of {first}'s value over the "
        "median token's; near 0 where the head does nothing when it attends there.",
        panes=tuple(panes),
        controls=(Control(label="measure", options=tuple(measures.values())),),
        height=340,
    )


def channels(views: Views) -> Figure | None:
    """Per-channel maxima of a site before and after a transform."""
    sites = [site.name for site in worst_first(views[0].report) if site.channel_absmax]
    transforms = [name for name in TRANSFORMS if any(name in site.channel_absmax_after for view in views for site in view.report.sites)]
    after = [name for name in transforms if name != "plain"] or ["plain"]
    if not sites:
        return None
    by_view = [{site.name: site for site in view.report.sites} for view in views]
    panes = []
    for view, found in zip(views, by_view, strict=True):
        frames = {}
        for (row, name), (column, transform) in product(enumerate(sites), enumerate(after)):
            shown = [each[name] for each in by_view if name in each]
            frame = _channels(found[name], transform) if name in found else _or_note([], "no such site")
            every = (value for site in shown for values in (site.channel_absmax, *site.channel_absmax_after.values()) for value in values)
            frames[f"{row}-{column}"] = Frame(data=frame.data, layout={**frame.layout, "yaxis": log_axis("largest |x|", every)})
        panes.append(Pane(title=view.name, layout=layout(axis("channel"), log_axis("largest |x|", ()), legend=True), frames=frames))
    return Figure(
        name="channels",
        title="Channels before and after a transform",
        caption="The largest |x| of ordinary tokens in each channel, or in a few neighbouring ones. After a rotation the channels are new "
        "directions. The flatter, the easier to quantize.",
        panes=tuple(panes),
        controls=(
            Control(label="input of (worst first)", options=tuple(sites)),
            Control(label="after", options=tuple(keyed(TRANSFORM_NAMES, name) for name in after)),
        ),
    )


def _channels(site: SiteFigures, transform: str) -> Frame:
    bins = len(site.channel_absmax)
    x = range(0, site.channels, -(-site.channels // bins))
    curves = {"as it is": site.channel_absmax}
    if transform != "plain" and transform in site.channel_absmax_after:
        curves[f"after {keyed(TRANSFORM_NAMES, transform)}"] = site.channel_absmax_after[transform]
    traces = []
    for index, (name, values) in enumerate(curves.items()):
        trace = packed_line(x, values, name, index, f"from channel %{{x}}<br>{name}: %{{y:{NUMBER}}}")
        traces.append({**trace, "mode": "lines", "line": {"color": VERMILION if index else GREY, "shape": "hv", "width": 1.5}})
    return Frame(data=tuple(traces))


def errors(views: Views) -> Figure | None:
    """Output error by layer and site, one heat map for each transform; only of reports in which errors were measured."""
    views = [view for view in views if any(site.errors for site in view.report.sites)]
    if not views:
        return None
    schemes = [scheme for scheme in reversed(SCHEMES) if any(scheme in site.errors for view in views for site in view.report.sites)]
    choices = list(product(enumerate(schemes), enumerate(TOKENS)))
    panes = []
    grids = {
        (view.name, scheme, tokens, transform): _grid(view, _error(tokens, scheme, transform), across=True)
        for view, (_, scheme), (_, tokens), transform in product(views, enumerate(schemes), enumerate(TOKENS), TRANSFORMS)
    }
    for view in views:
        frames = {}
        for (row, scheme), (column, tokens) in choices:
            traces = []
            for index, transform in enumerate(TRANSFORMS):
                grid = grids[view.name, scheme, tokens, transform]
                hover = f"%{{y}}.%{{x}}, {SCHEME_NAMES[scheme]}, {TRANSFORM_NAMES[transform]}<br>error %{{customdata:.2%}}"
                number = str(index + 1) if index else ""
                traces.append({**heat(_sites(view), _layers(view), grid, log=True, hover=hover), "xaxis": f"x{number}", "yaxis": "y"})
            scale = limits((each for key, each in grids.items() if key[1] == scheme), log=True)
            colours = {"coloraxis": colour_axis(*scale, f"relative output error at {SCHEME_NAMES[scheme]} (log)", log=True, above=1.05)}
            frames[f"{row}-{column}"] = Frame(data=tuple(traces), layout=colours)
        panes.append(Pane(title=view.name, layout=_four_panels(), frames=frames))
    return Figure(
        name="errors",
        title="Output error by site and transform",
        caption="||Y − Yq|| / ||Y|| of the layers that read the site, everything rounded to nearest: weights per channel, activations per token.",
        panes=tuple(panes),
        controls=(
            Control(label="formats", options=tuple(keyed(SCHEME_NAMES, scheme) for scheme in schemes)),
            Control(label="over", options=tuple(TOKENS.values())),
        ),
        height=520,
    )


def _four_panels() -> dict[str, object]:
    """Four heat maps side by side, one for each transform, with the layers from top to bottom."""
    found = layout(axis("", showgrid=False), axis("layer", autorange="reversed", showgrid=False), colours=colour_axis(1, 10, "", log=True))
    found["annotations"], width = [], 1 / len(TRANSFORMS)
    for index, transform in enumerate(TRANSFORMS):
        name, left = f"xaxis{index + 1}" if index else "xaxis", index * width
        found[name] = {"domain": [left, left + width - 0.02], "anchor": "y", "showgrid": False, "type": "category", "tickangle": -90}
        found["annotations"].append(label(PANELS[transform], left + width / 2 - 0.01, 1, "bottom"))
    found["margin"] |= {"t": 95, "b": 70}
    return found


def _measure(measure: str, tokens: str) -> Callable[[SiteFigures], float]:
    def value(site: SiteFigures) -> float:
        figures: Figures = getattr(site, tokens)
        return float(getattr(figures, measure))

    return value


def _error(tokens: str, scheme: str, transform: str) -> Callable[[SiteFigures], float | None]:
    def value(site: SiteFigures) -> float | None:
        found = site.errors if tokens == "ordinary" else site.errors_every
        return found.get(scheme, {}).get(transform)

    return value


def _vision(views: Views) -> bool:
    return views[0].report.quality != "perplexity"


def _layers(view: View) -> list[int]:
    return sorted({site.block for site in view.report.sites})


def _sites(view: View) -> list[str]:
    """In the order of the block."""
    return list(dict.fromkeys(site.site for site in view.report.sites))


def _grid(view: View, value: Callable[[SiteFigures], float | None], across: bool = False) -> Grid:
    """By site, then layer; across: by layer, then site. None where a block lacks a site."""
    found = {(site.block, site.site): value(site) for site in view.report.sites}
    rows: Iterable[Iterable[tuple[int, str]]] = (
        (((block, site) for site in _sites(view)) for block in _layers(view))
        if across
        else (((block, site) for block in _layers(view)) for site in _sites(view))
    )
    return [[found.get(key) for key in row] for row in rows]


def _map_layout(x: str, y: str, colours: dict[str, object]) -> dict[str, object]:
    return layout(axis(x, showgrid=False), axis(y, showgrid=False, autorange="reversed"), colours=colours)


def _or_note(traces: Sequence[Trace], text: str) -> Frame:
    return Frame(data=tuple(traces), layout={} if traces else note(text))
