"""Thresholds that a compressed model must meet, and whether it does.

A metric has a direction: a recovery must be at least what the gate says, a divergence at most. A value that is no number is a miss.

Where the threshold lies within the 95 % bound of a measured value (BOUND standard errors on the side of the threshold), the text is too short to
tell. By default the value decides all the same: the same checkpoint on the same text then always gets the same answer, and measuring less makes
a gate neither easier nor harder.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...quant.errors import PlanishError
from .paired import Measured

BOUND = 1.645  # standard errors: a normal variable is that much below its mean in 5 % of cases
MEAN = "mean"  # the key of recovery that means the mean over tasks


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric may be held to. least: whether more is better. low, high: between which a threshold makes sense. unit: written after values."""

    least: bool
    low: float
    high: float
    unit: str = ""
    example: str = ""

    def words(self, value: float, beside: float | None = None) -> str:
        """A value with its unit. beside: another that it is to be told from; so many digits more."""
        digits = next((digits for digits in range(4, 17) if beside in (None, value) or f"{value:.{digits}g}" != f"{beside:.{digits}g}"), 17)
        return f"{value:.{digits}g}{self.unit}"


METRICS: Mapping[str, Metric] = {
    "perplexity": Metric(False, 1, math.inf, example="12.5"),
    "perplexity_ratio": Metric(False, 0.5, math.inf, example="1.05, for 5 % more than the original's"),
    "kl": Metric(False, 0, math.inf, " nats per token", example="0.1, in nats per token"),
    "agreement": Metric(True, 0, 1, example="0.95, a share of tokens"),
    "recovery": Metric(True, 2, math.inf, " %", example="98, in per cent of the original's accuracy"),
    "accuracy": Metric(True, 0, 1, example="0.6, a share of a task's questions"),
}
"""By name; recovery and accuracy also of one task: `recovery.TASK`."""


def kind(name: str) -> str:
    """A metric's name without the task: recovery of recovery.arc_easy."""
    return name.partition(".")[0]


def bound(name: str, threshold: float, beside: float | None = None) -> str:
    """at most 0.1 nats per token. beside: a value that the threshold is to be told from."""
    metric = METRICS[kind(name)]
    return f"at {'least' if metric.least else 'most'} {metric.words(threshold, beside)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Thresholds; what is None is not asked for.

    At most: perplexity, perplexity_ratio (after by before), kl (mean KL divergence from the original, nats per token).
    At least: agreement (share of tokens with the original's likeliest token), recovery (accuracy in per cent of the original's: the mean over tasks,
    or by task, where `mean` is the mean), accuracy (by task, a share).
    in_doubt: what holds where a threshold lies within the 95 % bound of what was measured: the value, fail or pass.
    """

    perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    agreement: float | None = None
    recovery: float | Mapping[str, float] | None = field(default=None, hash=False)
    accuracy: Mapping[str, float] | None = field(default=None, hash=False)
    in_doubt: Literal["value", "fail", "pass"] = "value"

    def __post_init__(self) -> None:
        if self.in_doubt != "value" and not self:
            raise PlanishError(f"in_doubt is {self.in_doubt}, but no threshold is given. Give one, such as kl: 0.1.")
        for name, threshold in self.thresholds().items():
            metric = METRICS[kind(name)]
            if not metric.low <= threshold <= metric.high:
                raise PlanishError(f"{name} is held to {threshold:g}, which cannot be meant. Give a threshold such as {metric.example}.")

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.thresholds())

    def thresholds(self) -> dict[str, float]:
        """By the names that measured metrics have: kl, recovery, recovery.TASK."""
        found: dict[str, float] = {}
        for name in METRICS:
            value = getattr(self, name)
            if isinstance(value, Mapping):
                found.update({name if task == MEAN else f"{name}.{task}": threshold for task, threshold in value.items()})
            elif value is not None:
                found[name] = value
        return found

    def words(self) -> str:
        """kl at most 0.1; recovery at least 98 %."""
        return "; ".join(f"{name} {bound(name, threshold)}" for name, threshold in self.thresholds().items())

    def check_measured(self, measured: Iterable[str], where: str, instead: str) -> None:
        """PlanishError, before any work, if a threshold is about something that will not be measured.

        measured: the names that will be; where: the command, and instead: what to do, for the message.
        """
        known = set(measured)
        for name in self.thresholds():
            if name not in known:
                raise PlanishError(f"gate: {name} is not measured by {where}. {instead}")

    def judge(self, metrics: Mapping[str, Measured], on: Mapping[str, str] | str = "") -> "Judgement":
        """Hold what was measured against the thresholds; what is not among the metrics is missed.

        on: which text or tasks, in words, for all or by the metric's first name.
        """
        texts = dict.fromkeys(METRICS, on) if isinstance(on, str) else on
        unknown = Measured(value=math.nan)
        held = tuple(
            hold(name, metrics.get(name, unknown), threshold, self.in_doubt, texts.get(kind(name), ""))
            for name, threshold in self.thresholds().items()
        )
        return Judgement(met=all(one.met for one in held), held=held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One metric against its threshold. on: the text or the tasks, in words. doubtful: whether the threshold lies within the 95 % bound of the value;
    decided_by: the value, or the gate's in_doubt."""

    metric: str
    value: float
    error: float | None
    threshold: float
    on: str
    doubtful: bool
    decided_by: str
    met: bool

    def words(self) -> str:
        """recovery is 97.1 % ± 0.6, at least 98 % asked for, on arc_easy."""
        asked = f"{bound(self.metric, self.threshold, self.value)} asked for" + (f", on {self.on}" if self.on else "")
        if math.isnan(self.value):
            return f"{self.metric} could not be measured, {asked}"
        error = "" if self.error is None else f" ± {self.error:.2g}"
        text = f"{self.metric} is {METRICS[kind(self.metric)].words(self.value, self.threshold)}{error}, {asked}"
        decided = "the value decides" if self.decided_by == "value" else f"in_doubt: {self.decided_by}"
        return f"{text} (too close to tell at 95 %; {decided})" if self.doubtful else text


def hold(name: str, measured: Measured, threshold: float, in_doubt: str, on: str = "") -> Held:
    """One metric against its threshold."""
    value, error = measured.value, measured.error
    doubtful = error is not None and math.isfinite(value) and abs(value - threshold) < BOUND * error
    met = value >= threshold if METRICS[kind(name)].least else value <= threshold
    if doubtful and in_doubt != "value":
        met = in_doubt == "pass"
    decided_by = in_doubt if doubtful else "value"
    return Held(metric=name, value=value, error=error, threshold=threshold, on=on, doubtful=doubtful, decided_by=decided_by, met=met)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a gate says of a model. met: whether all thresholds are."""

    met: bool
    held: tuple[Held, ...]

    def sentence(self) -> str:
        """Gate met, or which thresholds are missed and by what values."""
        missed = [one.words() for one in self.held if not one.met]
        return f"Gate missed: {'; '.join(missed)}." if missed else f"Gate met: {'; '.join(one.words() for one in self.held)}."
