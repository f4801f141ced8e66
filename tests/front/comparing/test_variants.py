"""planish.recipe.variants and planish.comparing.pareto: grids of settings with names, fronts, and what to take."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_reports import comparison_report, row

from planish.comparing.pareto import COSTS, front, picks
from planish.quant.errors import PlanishError
from planish.recipe.schema import digest, load_recipe, with_settings
from planish.recipe.variants import named_recipes


def test_a_grid_has_every_combination_once() -> None:
    found = named_recipes(["w8a8", "w4a8"], ["calibration.length=64"], ["calibration.samples=8,16", "calibration.seed=0,1,2"])
    assert len(found) == 12
    assert list(found)[:2] == ["w8a8-samples=8-seed=0", "w8a8-samples=8-seed=1"]
    one = found["w4a8-samples=16-seed=2"]
    assert one.calibration is not None
    assert (one.name, one.calibration.samples, one.calibration.seed, one.calibration.length) == ("w4a8-samples=16-seed=2", 16, 2, 64)
    assert len({digest(recipe) for recipe in found.values()}) == 12


def test_nothing_varied_is_the_recipe_itself() -> None:
    assert named_recipes(["w8a8"], ["calibration.samples=4"]) == {"w8a8": with_settings(load_recipe("w8a8"), ["calibration.samples=4"])}


def test_commas_in_brackets_belong_to_a_value() -> None:
    found = named_recipes(["w8a8"], [], ["solver.gptq.damping=[0.01, 0.05],0.1"])
    assert list(found) == ["w8a8-damping=-0.01-0.05", "w8a8-damping=0.1"]
    assert found["w8a8-damping=-0.01-0.05"].solver.damping == (0.01, 0.05)  # type: ignore[union-attr]


def test_settings_of_one_name_are_told_apart() -> None:
    found = named_recipes(["w8a8"], [], ["scheme.weights.bits=4,8", "scheme.activations.bits=8"])
    assert list(found) == [f"w8a8-scheme.weights.bits={bits}-scheme.activations.bits=8" for bits in (4, 8)]


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        (["calibration.samples"], "Write PATH=V1,V2"),
        (["=1,2"], "Write PATH=V1,V2"),
        (["calibration.samples=4,,8"], "Write PATH=V1,V2"),
        (["calibration.samples=4,4"], "stands there twice"),
        (["calibration.samples=4", "calibration.samples=8"], "one setting twice"),
        (["calibration.sample=4,8"], "samples"),
        (["solver.rtn.damping=0.1"], "damping"),
        ([f"calibration.seed={','.join(map(str, range(300)))}"], "200 is the most"),
    ],
)
def test_what_cannot_be_varied(vary: list[str], words: str) -> None:
    with pytest.raises(PlanishError, match=words):
        named_recipes(["w8a8"], [], vary)


@pytest.mark.parametrize("given", ["w8a8", Path("mine.yaml"), load_recipe("w8a8")])
def test_one_recipe_is_no_list(given: Any) -> None:
    with pytest.raises(PlanishError, match=r"a comparison takes a list of them, such as \['w8a8', 'w4a8'\]"):
        named_recipes(given, [])


def test_the_front_leaves_out_who_is_beaten() -> None:
    report = comparison_report()
    assert report.fronts["size"] == ("w4a8-samples=32-damping=0.01", "w4a16-g128", "w4a8-best", "w8a8")
    assert report.fronts["time"] == ("w4a4-fast", "w4a8-samples=8-damping=0.01", "w8a8")
    for what, names in report.fronts.items():
        for one in report.rows:
            beaten = any(COSTS[what](other) <= COSTS[what](one) and other.kl <= one.kl for other in report.rows if other is not one)
            assert (one.recipe in names) == (not beaten)


def test_of_equals_the_first_stays() -> None:
    rows = [row("a", 0.1, 10, 1), row("b", 0.1, 10, 1)]
    assert front(rows, COSTS["size"]) == ("a",)
    assert front([], COSTS["size"]) == ()


def test_what_to_take() -> None:
    by_need = {pick.need: pick for pick in picks(comparison_report().rows, 0.15)}
    assert {need: pick.recipe for need, pick in by_need.items()} == {
        "best": "w8a8",
        "smallest": "w4a16-g128",
        "quickest": "w8a8",
        "portable": "w8a8",
    }
    assert "within 15 %" in by_need["smallest"].words
    assert "transformers, vLLM" in by_need["portable"].words


def test_where_nothing_is_good_enough_the_nearest_is_named() -> None:
    alone = [row("w4a4-fast", 0.24, 113, 29, ("planish",)), row("w4a8-best", 0.07, 121, 81, ("planish",))]
    best, smallest, quickest, portable = picks(alone, 0.01)
    assert (best.recipe, smallest.recipe, quickest.recipe, portable.recipe) == ("w4a8-best", None, None, None)
    assert "the nearest is w4a8-best" in smallest.words
    assert "planish alone" in portable.words


def test_a_ruined_recipe_is_the_worst() -> None:
    good, ruined = row("good", 0.1, 10, 1), row("ruined", 0.2, 5, 1)
    quality = {name: replace(one, kl=math.nan, change=math.nan) for name, one in ruined.quality.items()}
    ruined = replace(ruined, quality=quality)
    assert ruined.kl == ruined.change == math.inf
    assert picks([ruined, good], 0.5)[0].recipe == "good"
    assert front([ruined, good], COSTS["size"]) == ("ruined", "good")
