"""Gates as flags say them: --gate kl=0.1, or a recipe whose gate it is."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..common.decode import decode
from ..common.yamltext import parse_yaml
from ..eval.scores.gate import MEAN, METRICS, Gate, kind
from ..quant.errors import PlanishError
from .shipped import check_recipe

BY_TASK = ("recovery", "accuracy")


def read_gate(settings: Sequence[str]) -> Gate:
    """A gate of `metric=threshold` settings; one without "=" names a recipe whose gate is taken, for the others to change. Raises PlanishError."""
    gate = Gate()
    for name in (setting for setting in settings if "=" not in setting):
        if kind(name) in METRICS:
            raise _missing(name, name)
        check_recipe(name)
        from .schema import load_recipe  # torch comes with it

        gate = load_recipe(name).gate
        if not gate:
            raise PlanishError(f"--gate {name}: that recipe has no gate. Add one to it, or write thresholds, such as kl=0.1.")
    return with_thresholds(gate, [setting for setting in settings if "=" in setting])


def with_thresholds(gate: Gate, settings: Sequence[str]) -> Gate:
    """The gate with `metric=threshold` settings, such as `kl=0.1`, `recovery.arc_easy=95` or `in_doubt=fail`. Raises PlanishError."""
    data: dict[str, Any] = {}
    for key in fields(gate):
        if (value := getattr(gate, key.name)) != key.default:
            data[key.name] = value
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign or not name:
            raise PlanishError(f"--gate {setting!r} is no threshold. Write metric=threshold, such as kl=0.1.")
        first, _, task = name.partition(".")
        value = parse_yaml(text, f"--gate {setting}")
        if name == "accuracy":
            raise PlanishError(f"--gate {setting}: there is no accuracy of all tasks together. Name one: accuracy.TASK={text or 'NUMBER'}.")
        if value is None and kind(name) in METRICS:
            raise _missing(setting, name)
        if first in BY_TASK and (task or first == "recovery"):
            before = data.get(first, {})
            data[first] = {**(before if isinstance(before, Mapping) else {MEAN: before}), task or MEAN: value}
        else:
            data[name] = value
    return decode(Gate, data, "--gate") if settings else gate


def _missing(setting: str, name: str) -> PlanishError:
    """No number stands there, as where a script's variable is unset: a gate that is asked for is never silently left out."""
    return PlanishError(f"--gate {setting}: no threshold is given. Write {name}=NUMBER, such as {METRICS[kind(name)].example}.")
