"""planish.eval.pages.pictures and outlier_pictures: plotly takes what is drawn, scales are shared, and what is missing is left out."""

import base64
import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers_inspect import BLOCKS, HIDDEN, bare_report, compressed_report, small, smollm2_report

from planish.calib.outliers.diagnosis import Intervention
from planish.eval.pages import outlier_pictures, pictures
from planish.eval.pages.outlier_pictures import View
from planish.eval.pages.outlier_view import change, life, number, percent, place, quoted, ranges, unchanged_quality, worst_first
from planish.eval.pages.page import Figure
from planish.quant.errors import PlanishError

DRAWN = ("difficulty_map", "errors", "channels", "depth", "massive_depth", "landscape", "sink_map")
ALONE = (View("", smollm2_report()),)
BOTH = (View("now", compressed_report()), View("before", smollm2_report()))


def draw(name: str, views: tuple[View, ...]) -> Figure | None:
    found: Figure | None = getattr(outlier_pictures, name)(views)
    return found


def unpack(trace: dict) -> dict:  # type: ignore[type-arg]
    """What page.js does."""
    if "packed" not in trace:
        return trace
    packed = trace["packed"]
    levels = np.frombuffer(base64.b64decode(packed["values"]), dtype="<i2")
    logarithms, rest = np.where(levels == -32768, np.nan, levels / 1000), {key: value for key, value in trace.items() if key != "packed"}
    return {**rest, "z": logarithms.reshape(-1, len(packed["columns"]))} if "columns" in packed else {**rest, "y": 10**logarithms}


@pytest.mark.parametrize("views", [ALONE, BOTH], ids=["alone", "both"])
@pytest.mark.parametrize("name", DRAWN)
def test_plotly_takes_every_figure(name: str, views: tuple[View, ...]) -> None:
    figure = draw(name, views)
    assert figure is not None
    keys = {"-".join(map(str, choice)) for choice in itertools.product(*(range(len(control.options)) for control in figure.controls))}
    for pane in figure.panes:
        assert set(pane.frames) == keys
        for key in (sorted(keys)[0], sorted(keys)[-1]):
            frame = pane.frames[key]
            drawn = go.Figure(data=[unpack(dict(trace)) for trace in frame.data], layout=pane.layout)
            drawn.update_layout({path.replace(".", "_"): value for path, value in frame.layout.items()})
            assert all(trace.hovertemplate or trace.hoverinfo == "skip" for trace in drawn.data)


@pytest.mark.parametrize("name", DRAWN)
def test_side_by_side_means_the_same_scale(name: str) -> None:
    figure = draw(name, BOTH)
    assert figure is not None
    assert [pane.title for pane in figure.panes] == (["before"] if name == "errors" else ["now", "before"])
    scales = []
    for pane in figure.panes:
        frame = pane.frames[sorted(pane.frames)[0]]
        merged = {**pane.layout, **frame.layout}
        colours = merged.get("coloraxis") or {}
        scales.append((colours.get("cmin"), colours.get("cmax"), merged["yaxis"].get("range")))
    assert len({str(scale) for scale in scales}) == 1


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_to_draw(name: str) -> None:
    assert draw(name, (View("", bare_report()),)) is None


def test_a_site_that_a_block_lacks_is_a_gap() -> None:
    report = smollm2_report()
    fewer = replace(report, sites=tuple(site for site in report.sites if site.name != "3.o"))
    figure = outlier_pictures.difficulty_map((View("", fewer),))
    assert figure is not None
    (trace,) = figure.panes[0].frames["0-0"].data
    assert list(trace["y"]) == ["qkv", "o", "gate_up", "down"]
    assert [row[3] is None for row in trace["z"]] == [False, True, False, False]
    assert len(trace["z"][0]) == BLOCKS


def test_the_landscape_shows_what_was_measured() -> None:
    report = small(smollm2_report())
    figure = outlier_pictures.landscape((View("", report),))
    assert figure is not None
    picture, _ = figure.panes[0].frames["0"].data
    shown = 10 ** unpack(dict(picture))["z"]
    np.testing.assert_allclose(shown, report.landscapes[0].values, rtol=2e-3)
    assert picture["packed"]["columns"][-1] == f"{HIDDEN - 1}"
    assert picture["y"] == ["0 &lt;|im_start|&gt;", "1 user"]


def test_massive_activations_are_ringed() -> None:
    figure = outlier_pictures.landscape(ALONE)
    assert figure is not None
    start = figure.controls[0].start
    rings = figure.panes[0].frames[str(start)].data[1]
    assert figure.controls[0].options[start] == "layer 27"
    assert sorted(rings["x"]) == [12.0, 102.0, 247.0, 507.0]
    assert figure.panes[0].frames["0"].data[1]["x"] == []


def test_zeros_and_odd_numbers_are_gaps() -> None:
    trace = pictures.heat(["a"], ["b"], [[0.0, 10.0, None, math.inf]], log=True, hover="")
    assert trace["z"] == [[None, 1.0, None, None]]
    assert trace["customdata"] == [[0.0, 10.0, None, None]]
    packed = unpack(pictures.packed_heat([0], [0], [[0.0, 100.0, math.inf]], ["a", "b", "c"], hover=""))
    np.testing.assert_array_equal(packed["z"], [[math.nan, 2.0, math.nan]])
    curve = unpack(pictures.packed_line(range(0, 9, 3), [0.0, 100.0, 0.0123], "curve", 0, ""))
    np.testing.assert_allclose(curve["y"], [math.nan, 100.0, 0.0123], rtol=1.2e-3)
    assert (curve["x0"], curve["dx"], curve["name"]) == (0, 3, "curve")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.9, 12, [1, 2, 5, 10]), (1, 1000, [1, 10, 100, 1000]), (0.05, 25_300, [0.1, 1, 10, 100, 1000, 10000]), (3.1, 3.2, [3.1])],
)
def test_ticks_are_round_and_few(low: float, high: float, ticks: list[float]) -> None:
    found = pictures.log_ticks(low, high)
    assert len(found) <= 6
    assert all(low <= tick <= high for tick in found)
    assert found == ticks


def test_text_for_plotly_is_no_markup() -> None:
    assert pictures.plain('<b> & "\n"') == '&lt;b&gt; &amp; "\\n"'


def test_every_dark_colour_replaces_one_that_is_used() -> None:
    used = {colour for colour, _, _ in pictures.LINES} | {pictures.GREY, pictures.ORANGE}
    assert set(pictures.DARK) <= used
    assert len({(dash, marker) for _, dash, marker in pictures.LINES}) == len(pictures.LINES)


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(PlanishError, match=r"pip install 'planish\[plots\]'"):
        pictures.plotly_script()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (25_300.4, "25,300"),
        (123_456, "123,500"),
        (999.6, "1,000"),
        (0.01234, "0.0123"),
        (-2.5, "−2.50"),
        (1e-7, "1.00e-07"),
        (2e9, "2.00e+09"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_as_people_read_them(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_and_changes() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.012, 0.3, 13.0)] == ["0 %", "0.04 %", "1.2 %", "30 %", "1,300 %"]
    assert [change(quality, 20.0) for quality in (20.2, 19.8, 6000.0, math.inf)] == ["+1.0 %", "−1.0 %", "× 300", "× ∞"]
    assert ranges([3, 1, 2, 7, 9, 10]) == "1–3, 7, 9–10"
    assert quoted(' "a"\n\u200b') == '" "a"\\n\\u200b"'


def test_the_worst_comes_first() -> None:
    assert [site.name for site in worst_first(smollm2_report())[:3]] == ["2.down", "10.down", "9.down"]
    assert worst_first(compressed_report())[0].name == "2.down"


def test_where_massive_activations_live() -> None:
    row = smollm2_report().massive[0]
    assert (place(row), life(row, BLOCKS)) == ('position 0, "<|im_start|>"', "11–27")
    assert life(replace(row, born=-1, died=None), BLOCKS) == "embeddings–29"
    assert life(replace(row, born=3, died=4), BLOCKS) == "3"
    assert place(replace(row, position=None, token=None)) == "varying positions"


def test_the_unchanged_quality() -> None:
    assert unchanged_quality(smollm2_report()) == 20.25
    assert unchanged_quality(replace(smollm2_report(), interventions=(Intervention(name="x", layer=3, quality=1.0),))) is None
