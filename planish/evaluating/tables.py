"""An evaluation as people read it."""

import math
from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from ..common.fitting import Table
from ..common.units import counted, duration
from ..compressing.tables import gate_rows
from ..eval.scores.evaluation import Evaluation, MetricResult, TaskResult, TextResult, task_recovery
from ..eval.scores.paired import Measured

SURE = 0.05  # below this p value, answers that flipped are marked


def evaluation_tables(evaluation: Evaluation) -> tuple[RenderableType, ...]:
    """The text, the tasks, and how to read them."""
    parts: list[RenderableType] = [Text(title(evaluation), style="bold"), ""]
    if evaluation.notes:
        parts += [*(Text(f"  Note: {note}") for note in evaluation.notes), ""]
    if evaluation.text is not None:
        missing = [f"{name} not measured: {why}" for name, why in evaluation.text.missing.items()]
        parts += [_text_table(evaluation.text), _dim(text_words(evaluation.text)), *map(_dim, missing), ""]
    if evaluation.tasks:
        parts += [_task_table(evaluation), *map(_dim, task_words(evaluation)), ""]
    if evaluation.gate is not None:
        parts += [*(Text(f"  {name:<6}{words}") for name, words in gate_rows(evaluation.gate)), ""]
    return (*parts, _dim(f"took {duration(evaluation.seconds)} on {evaluation.device}, {counted(evaluation.threads, 'thread')}"))


def title(evaluation: Evaluation) -> str:
    """What was measured, against what."""
    served = evaluation.served
    engine = "" if served is None else " ".join(filter(None, (served.engine, served.version))) or "a server"
    by = "" if served is None else f" served by {engine} at {served.url},"
    against = f" against {evaluation.against}" if evaluation.against else ""
    return f"{evaluation.model}{by}{against}".rstrip(",")


def _dim(words: str) -> Text:
    return Text(f"  {words}", style="dim")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    return table


def figure(measured: Measured, digits: int, sign: bool = False) -> str:
    """12.345 ± 0.012; infinite, or NaN."""
    unusual = "NaN" if math.isnan(measured.value) else "infinite"
    value = f"{measured.value:{'+' if sign else ''}.{digits}f}" if math.isfinite(measured.value) else unusual
    return value if measured.error is None or not math.isfinite(measured.error) else f"{value} ± {measured.error:.{digits}f}"


def percent(measured: Measured) -> Measured:
    """A share with its error, in per cent."""
    return Measured(value=100 * measured.value, error=None if measured.error is None else 100 * measured.error)


def risen(ratio: Measured) -> str:
    """A ratio as the change that it is: +0.29 ± 0.08 %."""
    return f"{figure(percent(Measured(value=ratio.value - 1, error=ratio.error)), 2, sign=True)} %"


def _text_table(text: TextResult) -> Table:
    if text.base is None:
        table = _table("  text", "")
        table.add_row("  perplexity", figure(text.perplexity, 3))
        return table
    table = _table("  text", "base", "compressed", "")
    table.add_row("  perplexity", f"{text.base.perplexity:.3f}", figure(text.perplexity, 3), risen(text.base.ratio))
    kl, agreement = text.base.kl, text.base.agreement
    table.add_row("  KL divergence per token", "", "not measured" if kl is None else figure(kl, 4), "")
    table.add_row("  same likeliest token", "", "not measured" if agreement is None else f"{figure(percent(agreement), 1)} %", "")
    return table


def text_words(text: TextResult) -> str:
    """How the text was cut, and what was scored."""
    source = "the built-in text" if text.source == "builtin" else text.source
    overlap = "no overlap" if text.stride >= text.length - (text.bos == "window") else f"stride {text.stride}"
    bos = "each after a token for a beginning" if text.bos == "window" else "no token added before them"
    return f"{counted(text.windows, 'window')} of {text.length} tokens of {source}, {overlap}, {bos}; {text.tokens} predictions, {text.dtype}"


def _task_table(evaluation: Evaluation) -> Table:
    if not any(metric.base for task in evaluation.tasks for metric in task.metrics.values()):
        return _plain_table(evaluation.tasks)
    table = _table("  task, metric", "base", "now", "change", "recovery", "-, +", "p")
    for task in evaluation.tasks:
        main_first = sorted(task.metrics, key=lambda name: name != task.main)
        for i, name in enumerate(main_first):
            table.add_row(f"    {name}" if i else f"  {task.name} {name}", *_cells(task.metrics[name]))
    if evaluation.recovery is not None:
        table.add_row("  mean recovery", "", "", "", Text(_close(evaluation.recovery), style="bold"), "", "")
    return table


def _plain_table(tasks: Sequence[TaskResult]) -> Table:
    table = _table("  task", "metric", "value", "documents")
    for task in tasks:
        for i, (name, metric) in enumerate(task.metrics.items()):
            table.add_row("" if i else f"  {task.name}", name, _value(metric), "" if i else str(task.samples))
    return table


def _value(metric: MetricResult) -> str:
    own = Measured(value=metric.value, error=metric.error)
    return figure(percent(own), 1) + " %" if metric.right_or_wrong else figure(own, 3)


def _close(measured: Measured, sign: bool = False) -> str:
    """12.3±0.1: narrow, for a table of many columns."""
    return figure(measured, 1, sign).replace(" ", "")


def _cells(metric: MetricResult) -> list[RenderableType]:
    """In per cent, unless the metric is none of right and wrong."""
    base, share = metric.base, metric.right_or_wrong
    now = f"{100 * metric.value:.1f}" if share else f"{metric.value:.3f}"
    if base is None:
        return ["", now, "", "", "", ""]
    before = f"{100 * base.value:.1f}" if share else f"{base.value:.3f}"
    if base.difference is None:
        return [before, now, "", "", "", ""]
    apart = _close(percent(base.difference), sign=True) if share else figure(base.difference, 3, sign=True).replace(" ", "")
    recovery = "" if base.recovery is None else _close(base.recovery)
    if base.flips is None:
        return [before, now, apart, recovery, "", ""]
    p_value = Text(f"{base.flips.p_value:.3f}", style="bold" if base.flips.p_value < SURE else "")
    return [before, now, apart, recovery, f"{base.flips.lost}, {base.flips.gained}", p_value]


def task_words(evaluation: Evaluation) -> list[str]:
    """How to read the tasks."""
    documents = f"the first {evaluation.limit} documents of each" if evaluation.limit else "all documents"
    words = [f"lm-eval {evaluation.versions['lm-eval']}, {documents}, batches of {evaluation.batch_size}, {evaluation.dtype}; ± is a standard error"]
    if evaluation.against is None:
        return words
    words[0] = f"in per cent; {words[0]}, paired"
    words.append("lost (-): answers right before and wrong now; gained (+): the reverse; p: McNemar's exact test")
    counted = [task.main for task in evaluation.tasks if task_recovery(task) is not None]
    words.append(f"recovery: compressed / base, paired error by the delta method; mean over the {len(counted)} tasks' first metric")
    kept = [task.name for task in evaluation.tasks if task.base_cached]
    return [*words, f"base model's answers kept from earlier: {', '.join(kept)}"] if kept else words
