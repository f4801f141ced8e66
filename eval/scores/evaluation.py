"""What an evaluation finds, as data: a text, tasks, and both against the base model.

JSON of it: planish/common/schemas.py; how it is done: planish/evaluating/job.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .gate import Judgement
from .paired import Flips, Measured, average

Bos = Literal["none", "window"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBase:
    """The base model on the same text. perplexity: its own; ratio: compressed / base. kl: mean KL(base || compressed) per token in nats. agreement:
    share of tokens for which both find the same next token likeliest. Errors: paired, over windows. None: not
    measured, and TextResult.missing says why."""

    perplexity: float
    ratio: Measured
    kl: Measured | None
    agreement: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    """A text, and how well it is predicted. source: builtin (its half for evaluation) or a file. sha256: of the windows' token numbers as 64-bit
    integers. windows of length tokens, which begin stride tokens of text apart and share no other context; each scores the tokens that none before it
    has scored, the first of a window never (it has nothing before it). bos: none: the text as the tokenizer makes it; window: each window begins with
    one more token, the tokenizer's for a beginning, which counts in length. tokens: predictions that were scored. dtype: of the arithmetic.
    perplexity: exp of the mean negative log-likelihood; its error is that of means over windows, None for a single one. missing: figures
    that could not be measured, and why."""

    source: str
    sha256: str
    windows: int
    length: int
    stride: int
    bos: str
    tokens: int
    dtype: str
    perplexity: Measured
    base: TextBase | None
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricBase:
    """The base model on the same samples. difference: compressed - base, paired. recovery: 100 * compressed / base in per cent, with the paired error
    of the delta method; None where the base model scores zero. flips: for metrics that call each answer right or wrong."""

    value: float
    error: float | None
    difference: Measured | None
    recovery: Measured | None
    flips: Flips | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """A task's metric as lm-evaluation-harness computes it. error: standard error, for metrics that are means over samples. right_or_wrong: every
    sample counts 0 or 1."""

    value: float
    error: float | None
    higher_is_better: bool
    right_or_wrong: bool
    base: MetricBase | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """One task. version: the task's own. samples: documents that were answered; shots: examples shown before each. sha256: of all requests made to
    a model. main: the first of its metrics that calls each answer right or wrong, None if it has none; this is the task's accuracy. metrics: by name,
    with a comma and the filter's name where answers are filtered. base_cached: the base model's answers were kept from an earlier evaluation."""

    name: str
    version: str
    samples: int
    shots: int
    sha256: str
    main: str | None
    metrics: Mapping[str, MetricResult]
    base_cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedBy:
    """A server whose model was measured in place of the checkpoint in memory. model: its name there; root: where the server says that it has it from.
    engine, version: vLLM or SGLang, where it tells. context: tokens of a text and its answer at most."""

    url: str
    model: str
    root: str | None
    engine: str | None
    version: str | None
    context: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a compression cost. planish: the version that wrote this. finished: date and time, UTC. model, against: as given; their sha256: of all
    configuration, weight and tokenizer files. limit: documents of each task at most, the first ones. dtype: of the tasks' arithmetic. batch_size:
    requests that ran at once. versions: of the libraries. recovery: mean over the tasks that have one, in per cent. served: by what server, None:
    in this process. gate: thresholds, and whether they are met. notes: what a reader should know of the models."""

    planish: str
    finished: str
    model: str
    model_sha256: str
    against: str | None
    against_sha256: str | None
    limit: int | None
    batch_size: int
    dtype: str
    device: str
    threads: int
    versions: Mapping[str, str]
    seconds: float
    text: TextResult | None
    tasks: tuple[TaskResult, ...]
    recovery: Measured | None
    served: ServedBy | None = None
    gate: Judgement | None = None
    notes: tuple[str, ...] = ()


def task_recovery(task: TaskResult) -> Measured | None:
    """Of its main metric, in per cent; None without one, without a base model, or where that scores zero."""
    base = None if task.main is None else task.metrics[task.main].base
    return None if base is None else base.recovery


def mean_recovery(tasks: tuple[TaskResult, ...]) -> Measured | None:
    """Over the tasks that have a recovery, each counting alike."""
    return average([recovery for task in tasks if (recovery := task_recovery(task)) is not None])


def metrics(evaluation: Evaluation) -> dict[str, Measured]:
    """All figures that can be held against a limit, by name: perplexity, perplexity_ratio, kl, agreement, recovery (mean over tasks, in per cent),
    recovery.TASK and accuracy.TASK (shares). What was not measured is not there."""
    found: dict[str, Measured] = {}
    text = evaluation.text
    if text is not None:
        found["perplexity"] = text.perplexity
        if text.base is not None:
            compared = {"perplexity_ratio": text.base.ratio, "kl": text.base.kl, "agreement": text.base.agreement}
            found |= {name: measured for name, measured in compared.items() if measured is not None}
    if evaluation.recovery is not None:
        found["recovery"] = evaluation.recovery
    for task in evaluation.tasks:
        if task.main is not None:
            main = task.metrics[task.main]
            found[f"accuracy.{task.name}"] = Measured(value=main.value, error=main.error)
        if (recovery := task_recovery(task)) is not None:
            found[f"recovery.{task.name}"] = recovery
    return found
