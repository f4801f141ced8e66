"""The scatter plot: well-formed SVG in which marks stand where the values say and no two names overlap."""

import math
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from planish.eval.pages.scatter import HEIGHT, LEFT, LETTER, LINE, NARROW, SHARES, TOP, WIDTH, Panel, Point, round_ticks, scatter

SVG = "{http://www.w3.org/2000/svg}"
POINTS = (
    Point(label="w8a8", x=8.02, values=(0.001, 0.002)),
    Point(label="w4a8", x=8.02, values=(0.3, 0.4)),
    Point(label="w4a16-channel", x=4.02, values=(0.28, 0.38)),
    Point(label="w4a16-g128", x=4.13, values=(0.1, 0.27)),
)


def drawn(*points: Point, zero: bool = False) -> ET.Element:
    return ET.fromstring(scatter("A <title> & more", "KL", ["builtin", "wiki"], [Panel(x="bits", points=points, zero=zero)]))


def labels(svg: ET.Element, points: tuple[Point, ...]) -> list[tuple[float, float, str]]:
    """Left end, base line and text."""
    names = {point.label for point in points}
    found = [(text, text.text or "") for text in svg.iter(f"{SVG}text") if text.text in names]
    shares = [SHARES[text.get("text-anchor", "")] for text, _ in found]
    return [
        (float(text.get("x", "")) - share * LETTER * len(name), float(text.get("y", "")), name)
        for (text, name), share in zip(found, shares, strict=True)
    ]


def circles(svg: ET.Element) -> list[tuple[float, float]]:
    return [(float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in svg.iter(f"{SVG}circle")][1:]  # the first is the legend's


def test_every_point_has_its_marks_and_its_name() -> None:
    svg = drawn(*POINTS)
    assert len(circles(svg)) == len(list(svg.iter(f"{SVG}polygon"))) - 1 == 4
    assert sorted(name for _, _, name in labels(svg, POINTS)) == sorted(point.label for point in POINTS)
    (title,) = svg.iter(f"{SVG}title")
    assert title.text == "A <title> & more"


def test_marks_stand_where_the_values_say() -> None:
    where = dict(zip((point.label for point in POINTS), circles(drawn(*POINTS)), strict=True))
    assert where["w8a8"][0] == where["w4a8"][0] > where["w4a16-g128"][0] > where["w4a16-channel"][0] > LEFT
    assert TOP < where["w4a8"][1] < where["w4a16-channel"][1] < where["w4a16-g128"][1] < where["w8a8"][1] < TOP + HEIGHT
    decades = (where["w8a8"][1] - where["w4a16-g128"][1]) / (where["w8a8"][1] - where["w4a8"][1])
    assert decades == pytest.approx(2 / math.log10(300), abs=1e-3)


CROWD = tuple(Point(label=f"a-recipe-{i}", x=4 + 0.01 * i, values=(0.1, 0.11 + 0.01 * (i % 3))) for i in range(16))


@pytest.mark.parametrize("points", [POINTS, CROWD[:5], (*CROWD, Point(label="far", x=12, values=(3, 4)))])
def test_names_do_not_overlap_and_stay_inside(points: tuple[Point, ...]) -> None:
    found = labels(drawn(*points), points)
    for one, other in combinations(found, 2):
        apart = max(one[0], other[0]) - min(one[0] + LETTER * len(one[2]), other[0] + LETTER * len(other[2]))
        assert apart >= -0.2 or abs(one[1] - other[1]) >= LINE - 0.2
    assert all(x >= LEFT and x + LETTER * len(name) <= LEFT + WIDTH and TOP < y < TOP + HEIGHT for x, y, name in found)


def test_names_that_found_no_room_beside_their_marks_are_led_to() -> None:
    svg = drawn(*CROWD)
    leaders = [line for line in svg.iter(f"{SVG}line") if line.get("class") == "leader"]
    assert len(leaders) >= 8
    marks, boxes = circles(svg), labels(svg, CROWD)
    for line in leaders:
        x1, x2, y2 = (float(line.get(name, "")) for name in ("x1", "x2", "y2"))
        assert min(abs(x - x1) for x, _ in marks) < 0.1
        assert any(abs(y2 - (y + 4 - LINE / 2)) < 0.2 and x - 0.2 <= x2 <= x + LETTER * len(name) + 0.2 for x, y, name in boxes)
    assert not [line for line in drawn(*POINTS).iter(f"{SVG}line") if line.get("class") == "leader"]


def test_a_long_name_stays_inside_a_narrow_panel() -> None:
    points = (Point(label="a" * 30, x=6.0, values=(0.1, 0.2)), Point(label="b", x=4.0, values=(0.1, 0.2)), Point(label="c", x=8.0, values=(0.3, 0.4)))
    svg = ET.fromstring(scatter("t", "KL", ["one", "two"], [Panel(x="bits", points=points, width=NARROW)]))
    assert all(x >= LEFT and x + LETTER * len(name) <= LEFT + NARROW for x, _, name in labels(svg, points))


def test_what_cannot_be_drawn_is_left_out() -> None:
    svg = drawn(Point(label="lost", x=4.0, values=(math.inf, math.nan)), Point(label="same", x=8.0, values=(0.0, 0.1)), zero=True)
    assert not circles(svg)
    assert [text.text for text in svg.iter(f"{SVG}text") if text.text in ("lost", "same")] == ["same"]
    assert list(drawn().iter(f"{SVG}rect"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1e-5, 3e-4), {"1e-5", "1e-4"}),
        ((0.02, 0.3), {"0.02", "0.05", "0.1", "0.2"}),
        ((1.06e-4, 1.07e-4), {"1e-4"}),
        ((1.5, 1.5), {"1.5"}),
        ((1e5, 4e5), {"1e5", "2e5", "5e5"}),
    ],
)
def test_the_axis_has_one_short_notation(values: tuple[float, float], words: set[str]) -> None:
    svg = drawn(Point(label="a", x=4.0, values=values))
    ticks = [text.text or "" for text in svg.iter(f"{SVG}text") if (text.get("class"), text.get("text-anchor")) == ("tick", "end")]
    assert words <= set(ticks) or len(ticks) == 1
    assert len({"e" in tick for tick in ticks}) == 1
    assert all(len(tick) <= 6 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.9, 8.2), (0, 43.1), (0.02, 0.021), (0, 12345), (0, 0.29)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 4 <= len(ticks) <= 10
    assert low <= ticks[0] < ticks[-1] <= high


def test_the_front_goes_in_steps_through_the_topmost_marks() -> None:
    svg = ET.fromstring(scatter("t", "KL", ["a", "b"], [Panel(x="MB", points=POINTS, front=("w4a16-channel", "w4a16-g128", "w8a8"))]))
    (front,) = [line for line in svg.iter(f"{SVG}polyline") if line.get("class") == "front"]
    corners = [tuple(map(float, point.split(","))) for point in front.get("points", "").split()]
    assert len(corners) == 5
    assert all(before[1] == corner[1] for before, corner in zip(corners[::2], corners[1::2], strict=False))
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)


@pytest.mark.parametrize("count", [5, 80])
def test_lines_are_broken_where_there_is_no_value(count: int) -> None:
    values = [0.0 if i == 2 else 0.1 + 0.01 * i for i in range(count)]
    points = tuple(Point(label=f"block {i}", x=i, values=(value,)) for i, value in enumerate(values))
    svg = ET.fromstring(scatter("t", "error", ["down"], [Panel(x="block", points=points, joined=True)], heading=False))
    assert [len((line.get("points") or "").split()) for line in svg.iter(f"{SVG}polyline")] == [2, count - 3]
    hints = [title.text for title in svg.iter(f"{SVG}title")][1:]
    assert hints == ([f"block {i}: {value:.4g}" for i, value in enumerate(values) if value] if count == 5 else [])
    assert "block 1" not in [text.text for text in svg.iter(f"{SVG}text")]
