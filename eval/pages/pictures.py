"""The kit for figures: heat maps and lines for plotly.js, as plain data, in colours that colour-blind readers tell apart.

Heat maps are in cividis (Nuñez, Anderton and Renslow, "Optimizing colormaps with consideration for color vision deficiency", PLOS ONE 2018), lines in
the colours of Okabe and Ito ("Color Universal Design", 2008), each with its own dash and marker. plotly.js does the drawing, in the reader's browser;
it comes with the Python package plotly.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.errors import PlanishError

Grid = Sequence[Sequence[float | None]]
Trace = dict[str, Any]
Layout = dict[str, Any]

BLUE, VERMILION, GREEN, PURPLE, BLACK, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#7f858c"
LINES = (
    (BLUE, "solid", "circle"),
    (VERMILION, "dash", "square"),
    (GREEN, "dot", "diamond"),
    (PURPLE, "dashdot", "triangle-up"),
    (BLACK, "longdash", "x"),
)
DARK = {BLUE: "#56B4E9", VERMILION: "#E69F00", GREEN: "#1fc08f", BLACK: "#f2f2f2", ORANGE: "#F0E442", GREY: "#98a1ab"}
"""Colours that are too dark on a dark ground, and what stands for them there."""

NUMBER = ",.4~g"  # d3-format: 25,300 and 0.0123


def plotly_script() -> str:
    """The source of plotly.js, about 5 MB. Raises PlanishError if the package plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise PlanishError("pages with figures need the package plotly, which is not installed: pip install 'planish[plots]'.") from error
    return str(get_plotlyjs())


def plain(text: str) -> str:
    """Text for plotly.js, which takes some HTML in its labels: escaped, and what does not show spelled out."""
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return html.escape(shown, quote=False)


def limits(grids: Iterable[Grid], log: bool) -> tuple[float, float]:
    """The smallest and the largest value of some grids, of the positive ones if log; (1, 10) if there is none."""
    cells = chain.from_iterable(chain.from_iterable(grids))
    values = [value for value in cells if value is not None and math.isfinite(value) and (value > 0 or not log)]
    return (min(values), max(values)) if values else (1.0, 10.0)


def heat(x: Sequence[Any], y: Sequence[Any], values: Grid, *, log: bool, hover: str) -> Trace:
    """A heat map: values[row of y][column of x]; None where there is nothing. hover: of plotly.js, with the value as %{customdata}."""
    shown = [[_level(value, log) for value in row] for row in values]
    finite = [[value if value is not None and math.isfinite(value) else None for value in row] for row in values]
    return {**_heat(x, y, hover), "z": shown, "customdata": finite}


def packed_heat(x: Sequence[Any], y: Sequence[Any], values: Grid, columns: Sequence[str], *, hover: str) -> Trace:
    """A large heat map of logarithms, in 3 bytes a cell: page.js unpacks it. hover: with the value as %{customdata[0]}, and what columns says as [1].

    values: between 1e-32 and 1e32, or 0.
    """
    magnitudes = np.abs(np.asarray(values, dtype=np.float64)).reshape(len(y), len(columns))
    return {**_heat(x, y, hover), "packed": {"values": _packed(magnitudes), "columns": list(columns)}}


def packed_line(x: Sequence[Any], values: Sequence[float], name: str, style: int, hover: str) -> Trace:
    """A long line of magnitudes, in 3 bytes a point, else as `line`; on a log axis there is a gap where the value is 0."""
    return {**line(x, (), name, style, hover), "packed": {"values": _packed(np.abs(np.asarray(values, dtype=np.float64)))}}


def _packed(magnitudes: NDArray[np.float64]) -> str:
    """Logarithms as 16-bit integers: three digits of each value remain."""
    levels = np.full(magnitudes.shape, -32768, dtype="<i2")
    good = np.isfinite(magnitudes) & (magnitudes > 0)
    levels[good] = np.clip(np.rint(1000 * np.log10(magnitudes[good])), -32000, 32000).astype("<i2")
    return base64.b64encode(levels.tobytes()).decode()


def _heat(x: Sequence[Any], y: Sequence[Any], hover: str) -> Trace:
    return {"type": "heatmap", "x": list(x), "y": list(y), "coloraxis": "coloraxis", "hoverongaps": False, "hovertemplate": f"{hover}<extra></extra>"}


def _level(value: float | None, log: bool) -> float | None:
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return round(math.log10(value), 3) if log else value


def colour_axis(low: float, high: float, title: str, *, log: bool, above: float = 1.0) -> Layout:
    """The colours of a heat map from low to high, with a bar above it. above: where the bar stands; 1 is the plot's upper edge."""
    bar: Layout = {"orientation": "h", "x": 0, "xanchor": "left", "y": above, "yanchor": "bottom", "thickness": 10, "len": 0.6, "outlinewidth": 0}
    bar["title"] = {"text": title, "side": "top"}
    if log:
        ticks = log_ticks(low, high)
        bar |= {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:,.6g}" for tick in ticks]}
        low, high = math.log10(low), math.log10(high)
    return {"colorscale": "Cividis", "cmin": low, "cmax": high if high > low else low + 1, "colorbar": bar}


def log_ticks(low: float, high: float) -> list[float]:
    """At most 6 round numbers between low and high, evenly spread on a log scale as far as round numbers are."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{mantissa}e{exponent}") for exponent in exponents for mantissa in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 6:
            return inside or [low]
    return inside[:: -(-len(inside) // 6)]


def line(x: Sequence[Any], y: Sequence[float | None], name: str, style: int, hover: str) -> Trace:
    """A line with markers in the style of that number. hover: of plotly.js."""
    colour, dash, marker = LINES[style % len(LINES)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        **_positions(x),
        "y": [value if value is not None and math.isfinite(value) else None for value in y],
        "name": name,
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"color": colour, "symbol": marker, "size": 6},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _positions(x: Sequence[Any]) -> Trace:
    """Evenly spaced numbers are told by the first and the step."""
    return {"x0": x.start, "dx": x.step} if isinstance(x, range) else {"x": list(x)}


def log_axis(title: str, values: Iterable[float | None]) -> Layout:
    """A log axis that holds the values."""
    low, high = limits([[[*values]]], log=True)
    ends = [math.floor(10 * math.log10(low)) / 10 - 0.1, math.ceil(10 * math.log10(high)) / 10 + 0.1]
    step = 1 if ends[1] - ends[0] >= 2 else "D2"  # where there are few powers of ten, also 2 and 5 times them
    return {"title": {"text": title}, "type": "log", "dtick": step, "tickformat": ",~g", "range": ends, "automargin": True}


def axis(title: str, **more: Any) -> Layout:
    """Any other axis. more: of plotly.js."""
    return {"title": {"text": title}, "automargin": True, "zeroline": False, **more}


def layout(x: Layout, y: Layout, *, colours: Layout | None = None, legend: bool = False) -> Layout:
    """A plot with these axes. colours: of colour_axis, for heat maps."""
    found: Layout = {"xaxis": x, "yaxis": y, "margin": {"l": 50, "r": 15, "t": 75 if colours else 40, "b": 45}, "showlegend": legend}
    if colours:
        found["coloraxis"] = colours
    if legend:
        found["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return found


def note(text: str) -> Layout:
    """What an empty plot says."""
    return {"annotations": [label(plain(text), 0.5, 0.5, "middle")]}


def label(text: str, x: float, y: float, anchor: str) -> Layout:
    """Text in a plot, in shares of its width and height. anchor: what of the text stands at y: bottom, middle or top."""
    return {"text": text, "xref": "paper", "yref": "paper", "x": x, "y": y, "yanchor": anchor, "showarrow": False}


def keyed(names: Mapping[str, str], key: str) -> str:
    """The words for a key, or the key itself where there are none."""
    return names.get(key, key)
