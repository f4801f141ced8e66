"""Scatter plots with names at the points, as one SVG picture without a script: panels side by side that share a logarithmic y axis.

In the colours and marks of pictures.py, light or dark as the reader's system is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .pictures import BLACK, DARK, GREY, LINES, limits, log_ticks, plain

WIDTH, HEIGHT = 400, 330  # of a panel, in pixels
NARROW = 310  # likewise: for a page that is read on phones, too
LEFT, TOP, RIGHT, BOTTOM, GAP = 74, 82, 24, 56, 30
LETTER, LINE = 8.4, 15  # what a letter of a label takes at most, as fonts go, and a line
MARK = 5.0  # half a mark's width
MARKED = 48  # points of a line that get marks
SHARES = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of a text's width that lie before the place where it stands firm


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A named point with one value for every series; what is not positive and finite is not drawn."""

    label: str
    x: float
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One plot. x: what its x axis shows. zero: whether that begins at 0. front: labels of points, from left to right, whose topmost marks are
    joined by steps. joined: the points are a line for each series, in their order, without names. width: in pixels."""

    x: str
    points: tuple[Point, ...]
    zero: bool = False
    front: tuple[str, ...] = ()
    joined: bool = False
    width: int = WIDTH


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle that something takes."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: "_Box") -> bool:
        apart_x = self.x + self.width <= other.x or other.x + other.width <= self.x
        return not (apart_x or self.y + self.height <= other.y or other.y + other.height <= self.y)

    def within(self, other: "_Box") -> bool:
        across = other.x <= self.x and self.x + self.width <= other.x + other.width
        return across and other.y <= self.y and self.y + self.height <= other.y + other.height


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values from low to high become pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def scatter(title: str, y: str, series: Sequence[str], panels: Sequence[Panel], *, heading: bool = True) -> str:
    """The SVG document. y: what the y axis shows. series: their names, with the styles of pictures.LINES in turn. heading: show the title, too."""
    values = [[value for point in panel.points for value in point.values] for panel in panels]
    low, high = limits([values], log=True)
    down = _Scale(math.log10(low / 1.3), math.log10(high * 1.3), TOP + HEIGHT, TOP)
    top = 0 if heading else 34  # what is above the legend
    width, height = LEFT + sum(panel.width + GAP for panel in panels) - GAP + RIGHT, TOP + HEIGHT + BOTTOM - top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{plain(title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="ground" y="{top}" width="{width}" height="{height}"/>',
        *([_text(LEFT, 26, title, "heading")] if heading else []),
        *_legend(series),
        f'<text class="name" transform="translate(20 {TOP + HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{plain(y)}</text>',
    ]
    left = LEFT
    for panel in panels:
        parts += _panel(panel, left, down, log_ticks(low / 1.3, high * 1.3), first=left == LEFT)
        left += panel.width + GAP
    return "\n".join([*parts, "</svg>", ""])


def _style() -> str:
    """Rules for light, and what differs in the dark."""
    colours = [colour for colour, _, _ in LINES]
    light = [
        f"svg text{{font:13px system-ui,sans-serif;fill:{BLACK}}}",
        ".heading{font-size:16px;font-weight:600}",
        ".tick{font-size:12px;fill:#555}",
        ".label{paint-order:stroke;stroke:#fff;stroke-width:3px}",  # readable on lines, too
        ".ground{fill:#fff}",
        ".grid{stroke:#e3e6e8}",
        f".edge{{fill:none;stroke:{GREY}}}",
        f".tie{{stroke:{GREY}}}",
        f".leader{{stroke:{GREY};stroke-width:.7}}",
        f".front{{fill:none;stroke:{GREY};stroke-width:1.5;stroke-dasharray:5 4}}",
        *(f".s{i}{{fill:{colour}}}.l{i}{{fill:none;stroke:{colour};stroke-width:1.5}}" for i, colour in enumerate(colours)),
    ]
    dark = [
        f"svg text{{fill:{DARK[BLACK]}}}",
        ".tick{fill:#b9c0c7}",
        ".label{stroke:#15181b}",
        ".ground{fill:#15181b}",
        ".grid{stroke:#2c3136}",
        *(f".s{i}{{fill:{DARK.get(colour, colour)}}}.l{i}{{stroke:{DARK.get(colour, colour)}}}" for i, colour in enumerate(colours)),
    ]
    return f"{''.join(light)}@media screen and (prefers-color-scheme:dark){{{''.join(dark)}}}"


def _legend(series: Sequence[str]) -> Iterator[str]:
    at = float(LEFT)
    for i, name in enumerate(series):
        yield _mark(at + MARK, 50, i)
        yield _text(at + 2 * MARK + 6, 54, name)
        at += 2 * MARK + 6 + LETTER * len(name) + 24


def _panel(panel: Panel, left: float, down: _Scale, ticks: Sequence[float], *, first: bool) -> Iterator[str]:
    """Grid, axes and points of one plot."""
    xs = [point.x for point in panel.points] or [1.0]
    pad = 0.12 * (max(xs) if panel.zero else max(xs) - min(xs)) or 0.1 * max(xs)
    low, high = 0.0 if panel.zero else min(xs) - pad, max(xs) + pad
    across = _Scale(low, high, left, left + panel.width)
    for tick, words in zip(ticks, _powers(ticks), strict=True):
        height = down.at(math.log10(tick))
        yield f'<line class="grid" x1="{left:.1f}" x2="{left + panel.width:.1f}" y1="{height:.1f}" y2="{height:.1f}"/>'
        if first:
            yield _text(left - 8, height + 4, words, "tick", "end")
    for tick in round_ticks(low, high):
        at = across.at(tick)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}"/>'
        yield _text(at, TOP + HEIGHT + 18, f"{tick:,.6g}", "tick", "middle")
    yield f'<rect class="edge" x="{left:.1f}" y="{TOP}" width="{panel.width}" height="{HEIGHT}"/>'
    yield _text(left + panel.width / 2, TOP + HEIGHT + 42, panel.x, "name", "middle")
    if panel.joined:
        yield from _lines(panel, across, down)
        return
    yield from _front(panel, across, down)
    yield from _points(panel, across, down, _Box(left + 3, TOP + 3, panel.width - 6, HEIGHT - 6))


def _powers(ticks: Sequence[float]) -> list[str]:
    """The numbers in one notation, as short as there is room for beside the axis: 0.01, or all as 1e-2."""
    words = [f"{tick:.4g}" for tick in ticks]
    if all(len(word) <= 5 and "e" not in word for word in words):
        return words
    parts = [f"{tick:.1e}".split("e") for tick in ticks]
    return [f"{float(mantissa):g}e{int(power)}" for mantissa, power in parts]


def _lines(panel: Panel, across: _Scale, down: _Scale) -> Iterator[str]:
    """A line for each series, broken where there is no value; with marks where there is room for them, each of which says its value on hovering."""
    for i in range(max((len(point.values) for point in panel.points), default=0)):
        places = [(point, across.at(point.x), down.at(math.log10(point.values[i]))) for point in panel.points if _drawn(point.values[i])]
        runs: list[list[str]] = [[]]
        for point in panel.points:
            if _drawn(point.values[i]):
                runs[-1].append(f"{across.at(point.x):.1f},{down.at(math.log10(point.values[i])):.1f}")
            else:
                runs.append([])
        yield from (f'<polyline class="l{i % len(LINES)}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1)
        if len(panel.points) <= MARKED:
            yield from (f"<g><title>{plain(f'{point.label}: {point.values[i]:.4g}')}</title>{_mark(x, y, i, MARK / 2)}</g>" for point, x, y in places)


def _front(panel: Panel, across: _Scale, down: _Scale) -> Iterator[str]:
    """Steps to the right and down: what lies below them is out of reach."""
    by_label = {point.label: point for point in panel.points}
    places = []
    for label in panel.front:
        values = [value for value in by_label[label].values if _drawn(value)]
        places += [(across.at(by_label[label].x), down.at(math.log10(max(values))))] if values else []
    if len(places) > 1:
        steps = [f"{x:.1f},{before:.1f} {x:.1f},{y:.1f}" for (_, before), (x, y) in pairwise(places)]
        yield f'<polyline class="front" points="{places[0][0]:.1f},{places[0][1]:.1f} {" ".join(steps)}"/>'


def _drawn(value: float) -> bool:
    """Whether a log axis has a place for it."""
    return value > 0 and math.isfinite(value)


def _points(panel: Panel, across: _Scale, down: _Scale, frame: _Box) -> Iterator[str]:
    """Each point's marks, tied together, and its name where there is room."""
    shown = []
    for point in panel.points:
        heights = {i: down.at(math.log10(value)) for i, value in enumerate(point.values) if _drawn(value)}
        if heights:
            shown.append((point, across.at(point.x), heights))
    taken = [_Box(x - MARK, height - MARK, 2 * MARK, 2 * MARK) for _, x, heights in shown for height in heights.values()]
    taken += [_Box(x - 1, min(heights.values()), 2, max(heights.values()) - min(heights.values())) for _, x, heights in shown]
    names = []
    for point, x, heights in shown:
        yield f'<line class="tie" x1="{x:.1f}" x2="{x:.1f}" y1="{min(heights.values()):.1f}" y2="{max(heights.values()):.1f}"/>'
        yield from (_mark(x, height, i) for i, height in heights.items())
        box, anchor = _free(point.label, x, sorted(heights.values()), taken, frame)
        taken.append(box)
        yield from _leader(box, x, heights.values())
        names.append(_text(box.x + SHARES[anchor] * box.width, box.y + LINE - 4, point.label, anchor=anchor))
    yield from names


def _leader(box: _Box, x: float, heights: Iterable[float]) -> Iterator[str]:
    """A line from the nearest mark to a name that found no room beside it."""
    middle = box.y + box.height / 2
    nearest = min(heights, key=lambda height: abs(height - middle))
    end = min(max(x, box.x), box.x + box.width)
    if max(abs(end - x), abs(middle - nearest) - LINE) > 2 * MARK:
        yield f'<line class="leader" x1="{x:.1f}" y1="{nearest:.1f}" x2="{end:.1f}" y2="{middle:.1f}"/>'


def _free(label: str, x: float, heights: Sequence[float], taken: Sequence[_Box], frame: _Box) -> tuple[_Box, str]:
    """Where the name goes, and which end of it stands firm: beside a mark, above or below all of them; the first place that nothing takes, else
    the nearest farther away, else the first."""
    width = LETTER * len(label)
    rows = [(height - LINE / 2, MARK + 3) for height in heights] + [(heights[0] - MARK - 2 - LINE, -4.0), (heights[-1] + MARK + 2, -4.0)]
    places = [(_Box(at, y, width, LINE), anchor) for y, away in rows for at, anchor in ((x + away, "start"), (x - away - width, "end"))] + [
        (_Box(min(max(x - width / 2, frame.x), frame.x + frame.width - width), y, width, LINE), "middle") for y, _ in rows[len(heights) :]
    ]
    inside = [place for place in places if place[0].within(frame)] or places
    far = ((place, anchor) for place, anchor in _farther(width, x, heights[0]) if place.within(frame))
    return next((place for place in (*inside, *far) if not any(place[0].meets(other) for other in taken)), inside[0])


def _farther(width: float, x: float, height: float) -> list[tuple[_Box, str]]:
    """Places round a mark, the nearest first."""
    steps = [(across, down) for across in range(0, WIDTH, 2 * LINE) for down in range(-HEIGHT, HEIGHT, LINE)]
    steps.sort(key=lambda step: (step[0] ** 2 + step[1] ** 2, step))
    beside = MARK + 3
    return [
        (_Box(at, height - LINE / 2 + down, width, LINE), anchor)
        for across, down in steps
        for at, anchor in ((x + beside + across, "start"), (x - beside - across - width, "end"))
    ]


def _mark(x: float, y: float, style: int, half: float = MARK) -> str:
    """The mark of a series: each has a shape of its own."""
    index = style % len(LINES)
    if LINES[index][2] == "circle":
        return f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="{0.9 * half:.3g}"/>'
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "diamond": ((0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)),
        "triangle-up": ((0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
        "x": (
            (-0.3, -1),
            (0.3, -1),
            (0.3, -0.3),
            (1, -0.3),
            (1, 0.3),
            (0.3, 0.3),
            (0.3, 1),
            (-0.3, 1),
            (-0.3, 0.3),
            (-1, 0.3),
            (-1, -0.3),
            (-0.3, -0.3),
        ),
    }[LINES[index][2]]
    points = " ".join(f"{x + half * a:.1f},{y + half * b:.1f}" for a, b in corners)
    return f'<polygon class="s{index}" points="{points}"/>'


def _text(x: float, y: float, words: str, kind: str = "label", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{plain(words)}</text>'


def round_ticks(low: float, high: float) -> list[float]:
    """4 to 9 round numbers between low and high, evenly spaced."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (5, 2, 1) if (high - low) / (power * factor) >= 4)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
