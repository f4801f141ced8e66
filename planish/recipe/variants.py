"""Variants of recipes over settings: every combination of the values that `--vary PATH=V1,V2` names, as recipes with names of their own."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from ..quant.errors import PlanishError
from .schema import Recipe, load_recipe, with_settings

MOST = 200  # recipes of one comparison: more is a slip of the pen


def named_recipes(recipes: Sequence[Recipe | str | Path], settings: Sequence[str], vary: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes with the settings, each in every variant, by names that files can have. vary: PATH=V1,V2 each.

    Raises PlanishError: no recipe, two of one name, too many variants, something wrong with one.
    """
    given: object = recipes  # a str is a sequence of str
    if isinstance(given, (str, Path, Recipe)):
        one = "one recipe" if isinstance(given, Recipe) else repr(str(given))
        raise PlanishError(f"recipes is {one}, but a comparison takes a list of them, such as ['w8a8', 'w4a8'].")
    if not recipes:
        raise PlanishError("a comparison needs recipes: name one or more, such as w8a8 w4a8.")
    axes = [_axis(each) for each in vary]
    labels = _labels([path for path, _ in axes])
    found: dict[str, Recipe] = {}
    for given in recipes:
        recipe = given if isinstance(given, Recipe) else load_recipe(given)
        for values in product(*(values for _, values in axes)):
            chosen = [f"{path}={value}" for (path, _), value in zip(axes, values, strict=True)]
            variant = with_settings(recipe, [*settings, *chosen])
            own = [variant.name, *(f"{label}={value}" for label, value in zip(labels, values, strict=True))]
            name = re.sub(r"[^\w.=-]+", "-", "-".join(own)).strip(".-") or "recipe"
            if name in found:
                raise PlanishError(f"two recipes are named {name}. Give one of them another name: it is the line `name:` of its file.")
            found[name] = replace(variant, name=name) if axes else variant
    if len(found) > MOST:
        raise PlanishError(f"--vary makes {len(found)} recipes of {len(recipes)}, and {MOST} is the most. Leave some values out.")
    return found


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    """PATH and its values; commas inside brackets belong to a value."""
    path, sign, rest = text.partition("=")
    values = tuple(_split(rest))
    if not sign or not path or not all(values):
        raise PlanishError(f"--vary {text!r} is no variation. Write PATH=V1,V2, such as calibration.samples=8,32.")
    if len(set(values)) < len(values):
        raise PlanishError(f"--vary {text}: a value stands there twice.")
    return path, values


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _labels(paths: Sequence[str]) -> list[str]:
    """What the settings are called in names: the last key, or the whole path where that is another's too."""
    last = [path.rpartition(".")[2] for path in paths]
    if len(set(paths)) < len(paths):
        raise PlanishError("--vary names one setting twice. Give all of its values at once.")
    return [path if last.count(key) > 1 else key for path, key in zip(paths, last, strict=True)]
