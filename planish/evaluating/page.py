"""An evaluation as a page, and as Markdown for a pull request."""

from collections.abc import Iterator, Mapping

from ..common.units import change, counted, duration, perplexity
from ..compressing.page import gate_lines
from ..eval.pages.markdown import escaped, page_table, points
from ..eval.pages.page import Card, Column, Links, Page, Part, Table, Words, render, section
from ..eval.scores.evaluation import Evaluation, MetricResult, TextResult
from .tables import figure, percent, risen, task_words, text_words, title

HEADINGS = ("", "base", "compressed", "change")


def eval_page(evaluation: Evaluation, links: Mapping[str, str]) -> str:
    """The page as one HTML document, which needs no plotting library. links: other pages beside it -> what they are."""
    sections = (
        section("gate", "Gate", [_gate(evaluation)]),
        section("text", "Text", _text(evaluation)),
        section("tasks", "Tasks", _tasks(evaluation)),
        section("method", "How it was measured", [_made(evaluation)]),
        section("links", "See also", [Links(to=links) if links else None]),
    )
    return render(
        Page(
            title=f"Evaluation of {evaluation.model}",
            subtitle=f"{title(evaluation)}; {evaluation.finished}.",
            cards=tuple(_cards(evaluation)),
            sections=tuple(each for each in sections if each.parts),
            about=f"eval: {title(evaluation)}",
        )
    )


def eval_markdown(evaluation: Evaluation) -> str:
    """The tables and the gate."""
    tables = [part for part in (*_text(evaluation), *_tasks(evaluation)) if isinstance(part, Table)]
    text = "\n".join(f"{page_table(table)}\n{escaped(table.caption)}\n" for table in tables)
    gate = "" if evaluation.gate is None else f"\n{points(gate_lines(evaluation.gate))}"
    notes = "".join(f"Note: {escaped(note)}\n\n" for note in evaluation.notes)
    return f"### {escaped(title(evaluation))}\n\n{notes}{text}{gate}"


def _cards(evaluation: Evaluation) -> Iterator[Card]:
    if gate := evaluation.gate:
        yield Card(label="Gate", value="met" if gate.met else "missed", note=counted(len(gate.held), "threshold"), target="gate")
    if text := evaluation.text:
        base = text.base
        note = "" if base is None else f"{change(base.ratio.value - 1)} from {perplexity(base.perplexity)}"
        yield Card(label="Perplexity", value=perplexity(text.perplexity.value), note=note, target="text")
        if base is not None and base.kl is not None:
            yield Card(label="KL divergence", value=f"{base.kl.value:.4f}", note="nats per token", target="text")
    if evaluation.recovery is not None:
        tasks = counted(len(evaluation.tasks), "task")
        yield Card(label="Mean recovery", value=f"{figure(evaluation.recovery, 1)} %", note=f"of {tasks}", target="tasks")
    where = f"{evaluation.device}, {counted(evaluation.threads, 'thread')}"
    yield Card(label="Time", value=duration(evaluation.seconds), note=where, target="method")


def _gate(evaluation: Evaluation) -> Part | None:
    return None if evaluation.gate is None else Words(lines=gate_lines(evaluation.gate), points=True)


def _text(evaluation: Evaluation) -> Iterator[Part]:
    text = evaluation.text
    if text is None:
        return
    columns = tuple(Column(heading=heading, numeric=i > 0) for i, heading in enumerate(HEADINGS))
    yield Table(caption=text_words(text), columns=columns, rows=tuple(_text_rows(text)))
    if text.missing:
        yield Words(lines=tuple(f"{name} not measured: {why}" for name, why in text.missing.items()), points=True)


def _text_rows(text: TextResult) -> Iterator[tuple[object, ...]]:
    base = text.base
    if base is None:
        yield "perplexity", None, figure(text.perplexity, 3), None
        return
    yield "perplexity", f"{base.perplexity:.3f}", figure(text.perplexity, 3), risen(base.ratio)
    yield "KL divergence, nats per token", None, None if base.kl is None else figure(base.kl, 4), None
    yield "same likeliest token", None, None if base.agreement is None else f"{figure(percent(base.agreement), 1)} %", None


def _tasks(evaluation: Evaluation) -> Iterator[Part]:
    if not evaluation.tasks:
        return
    columns = (
        Column(heading="task"),
        Column(heading="metric"),
        Column(heading="documents", numeric=True),
        *(Column(heading=heading, numeric=True) for heading in HEADINGS[1:]),
        Column(heading="recovery", numeric=True, note="compressed / base, in per cent"),
        Column(heading="lost, gained", note="right before and wrong now; and the other way"),
        Column(heading="p", numeric=True, note="McNemar's exact test", show=lambda value: f"{value:.3f}"),
    )
    rows = tuple((task.name, name, task.samples, *_cells(metric)) for task in evaluation.tasks for name, metric in task.metrics.items())
    if evaluation.recovery is not None:
        rows += (("mean", "each task's first", None, None, None, None, figure(evaluation.recovery, 1), None, None),)
    yield Table(caption="Shares in per cent; ± is a standard error, paired where it is of a change", columns=columns, rows=rows)
    yield Words(lines=tuple(task_words(evaluation)), points=True)


def _cells(metric: MetricResult) -> tuple[object, ...]:
    base, scale = metric.base, 100 if metric.right_or_wrong else 1
    digits = 1 if metric.right_or_wrong else 3
    now = f"{scale * metric.value:.{digits}f}"
    if base is None:
        return (None, now, None, None, None, None)
    apart = base.difference if base.difference is None or not metric.right_or_wrong else percent(base.difference)
    return (
        f"{scale * base.value:.{digits}f}",
        now,
        None if apart is None else figure(apart, digits, sign=True),
        None if base.recovery is None else figure(base.recovery, 1),
        None if base.flips is None else f"{base.flips.lost}, {base.flips.gained}",
        None if base.flips is None else base.flips.p_value,
    )


def _made(evaluation: Evaluation) -> Table:
    versions = ", ".join(f"{name} {number}" for name, number in {"planish": evaluation.planish, **evaluation.versions}.items())
    rows = [
        ("model", f"{evaluation.model}, SHA-256 {evaluation.model_sha256}"),
        *([("base", f"{evaluation.against}, SHA-256 {evaluation.against_sha256}")] if evaluation.against else []),
        *(("note", note) for note in evaluation.notes),
        ("tasks' arithmetic", evaluation.dtype),
        ("versions", versions),
    ]
    return Table(caption="The run", columns=(Column(heading="what"), Column(heading="value", long=True)), rows=tuple(rows))
