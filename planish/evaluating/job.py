"""What a compression cost, on a text and on tasks.

The base model is asked first (or what is kept of it is read), then the compressed one: one model is in memory at a time.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calib.compressed.stored import StoredCheckpoint, open_any
from ..calib.files.checkpoint import Checkpoint, check_language
from ..calib.machine.device import device_name, pick_device
from ..calib.machine.heap import trim
from ..common.files import write_text
from ..common.outfile import check_outfiles
from ..common.page_links import beside
from ..common.schemas import to_json
from ..common.texts import NO_TEXT
from ..eval.scores.evaluation import Bos, Evaluation, MetricBase, MetricResult, TaskResult, TextResult, mean_recovery, metrics
from ..eval.scores.gate import Gate
from ..eval.scores.measured import COMPARED
from ..eval.scores.paired import Measured, difference, flips, mean, ratio
from ..eval.scores.score import Report, check_vocabularies
from ..eval.scores.text_score import BaseHidden, TextSettings, Windows, cut, hidden_states, measure_text
from ..eval.servers.client import SECONDS, Server, connect
from ..eval.servers.served import check_context, measure_served
from ..eval.tasks.task_cache import Answers, check_keepable, keep_answers, keep_hidden, kept_answers, kept_hidden, key_of, model_digest
from ..eval.tasks.tasks import Task, check_names, open_tasks
from ..eval.verifying.origin import check_made_from, origin_note
from ..loading.model import load
from ..quant.errors import PlanishError, nearest
from ..recipe.thresholds import BY_TASK
from ..walk.callbacks import Callback, Progress, Told
from .page import eval_markdown, eval_page

if TYPE_CHECKING:
    from ..eval.tasks.harness import LoadedLM
    from ..eval.tasks.served_lm import ServedLM


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    include_path: str | Path | None = None,
    text: str = "builtin",
    windows: int = 4,
    length: int = 2048,
    stride: int | None = None,
    bos: Bos = "none",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    server: str | None = None,
    served_name: str | None = None,
    server_timeout: float = SECONDS,
    gate: Gate | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Evaluation:
    """Measure a model on a text and on tasks of lm-evaluation-harness, and hold it against the model that it was made from.

    model: a checkpoint that planish wrote, or anything that compress takes. against: the base model; what it says is kept in the user's cache folder.
    tasks: names, with the first `limit` documents of each (None: all); include_path: a folder with more tasks. They need the extra planish[eval].
    text: builtin, a file as of calib.data, or none; windows, length, stride, bos: how it is cut, see eval.text_score. batch_size: requests of a task
    that run at once. dtype: of the arithmetic; default: tasks as each model is stored, as lm-evaluation-harness has it, and the text in float32, as
    everywhere in planish. server: address of a running OpenAI-compatible server, whose model is measured in place of the one in memory; served_name:
    what the model is called there, if several are; server_timeout: seconds for one answer. gate: thresholds, judged in the result's `gate`.
    progress: who shows what happens; callbacks: who else is told, and gets all metrics. Raises PlanishError, for what is wrong with any of these
    before anything is computed.
    """
    job = EvalJob(
        model=str(model),
        against=None if against is None else str(against),
        tasks=tuple(tasks),
        limit=limit,
        include_path=None if include_path is None else Path(include_path),
        text=None if text == NO_TEXT else TextSettings(source=text, windows=windows, length=length, stride=stride, bos=bos),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        server=server,
        served_name=served_name,
        server_timeout=server_timeout,
        gate=gate or Gate(),
    )
    return job.run(job.plan(), Told(progress, callbacks))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EvalPlan:
    """Everything opened and looked at, nothing computed."""

    checkpoint: Checkpoint
    base: Checkpoint | None
    windows: Windows | None
    tasks: tuple[Task, ...]
    device: torch.device
    server: Server | None
    start: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalJob:
    """What the user asked for, as of `evaluate`. text None: no text. out: a file for the result; html, markdown: for it as a page and as Markdown.
    force: replace such files."""

    model: str
    against: str | None
    tasks: tuple[str, ...]
    limit: int | None
    include_path: Path | None
    text: TextSettings | None
    batch_size: int
    device: str | torch.device | None
    dtype: torch.dtype | None
    allow_pickle: bool = False
    out: Path | None = None
    html: Path | None = None
    markdown: Path | None = None
    force: bool = False
    server: str | None = None
    served_name: str | None = None
    server_timeout: float = SECONDS
    gate: Gate = Gate()

    def plan(self) -> EvalPlan:
        """Open models, text and tasks. Raises PlanishError for all that can be refused beforehand."""
        if self.batch_size < 1:
            raise PlanishError(f"batch size is {self.batch_size}, but must be at least 1.")
        if self.limit is not None and self.limit < 1:
            raise PlanishError(f"limit is {self.limit}, but must be at least 1. Leave it out for all documents.")
        if not self.tasks and (self.text is None or self.include_path is not None or self.limit is not None):
            raise PlanishError("no task is given. Name some with --tasks, or measure a text alone, without --include-path and --limit.")
        check_outfiles({"--out": self.out, "--html": self.html, "--markdown": self.markdown}, replace=self.force)
        device = pick_device(self.device)
        if self.tasks:
            check_names(self.tasks, self.include_path)
        checkpoint = open_any(self.model, allow_pickle=self.allow_pickle)
        base = None if self.against is None else open_any(self.against, allow_pickle=self.allow_pickle)
        for one in (checkpoint, *([] if base is None else [base])):
            check_language(one, "evaluate it")
        if base is not None:
            check_vocabularies(base, checkpoint)
            if isinstance(checkpoint, StoredCheckpoint):
                check_made_from(base, checkpoint)
            check_keepable()
        windows = None if self.text is None else cut(checkpoint, self.text)
        tasks = open_tasks(self.tasks, limit=self.limit, include_path=self.include_path) if self.tasks else ()
        self._check_gate(windows is not None, base is not None, [task.name for task in tasks])
        server = self._connect(checkpoint, windows)
        return EvalPlan(checkpoint=checkpoint, base=base, windows=windows, tasks=tasks, device=device, server=server)

    def _check_gate(self, text: bool, base: bool, tasks: Sequence[str]) -> None:
        """PlanishError if a threshold is about what will not be measured."""
        measured = (["perplexity"] if text else []) + [f"accuracy.{task}" for task in tasks]
        if text and base:
            measured += ["perplexity_ratio", "agreement"] + ([] if self.server else ["kl"])
        if tasks and base:
            measured += ["recovery", *(f"recovery.{task}" for task in tasks)]
        missing = [name for name in self.gate.thresholds() if name not in measured]
        if missing:
            self.gate.check_measured(measured, "this evaluation", self._instead(missing[0], text, base, tasks))

    def _instead(self, metric: str, text: bool, base: bool, tasks: Sequence[str]) -> str:
        """What to do so that a threshold's metric is measured, or what else to hold to one."""
        name, _, task = metric.partition(".")
        on_tasks = name in BY_TASK
        flags = ["--tasks"] if on_tasks and not tasks else ["--text"] if not on_tasks and not text else []
        flags += ["--against MODEL"] if not base and name not in ("perplexity", "accuracy") else []
        if flags:
            return f"Give {' and '.join(flags)}, or leave that threshold out."
        return nearest(task, tasks) if task else "No server tells whole distributions: leave that threshold out, or --server."

    def _connect(self, checkpoint: Checkpoint, windows: Windows | None) -> Server | None:
        if self.server is None and self.served_name is not None:
            raise PlanishError(f"served name {self.served_name}: no server is given that could have it. Add --server URL, or leave it out.")
        if self.server is None:
            return None
        server = connect(self.server, checkpoint, model=self.served_name, seconds=self.server_timeout)
        if windows is not None:
            check_context(server, windows.ids.shape[1])
        return server

    def run(self, plan: EvalPlan, progress: Progress) -> Evaluation:
        """Measure all that was asked for."""
        notes = self._notes(plan)
        for note in notes:
            progress.say(note)
        digests = [model_digest(one) for one in (plan.checkpoint, *([] if plan.base is None else [plan.base]))]
        text = None if plan.windows is None else self._text(plan, plan.windows, digests[-1], progress)
        base: Sequence[Answers | None] = [None] * len(plan.tasks)
        cached: frozenset[str] = frozenset()
        if plan.base is not None:
            base, cached = self._base_answers(plan, plan.base, digests[-1], progress)
        own = self._answers(plan.checkpoint, plan.tasks, plan.device, "compressed" if plan.base else "model", progress, server=plan.server)
        tasks = tuple(task_result(task, one, other, task.name in cached) for task, one, other in zip(plan.tasks, own, base, strict=True))
        evaluation = Evaluation(
            planish=version("planish"),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=self.model,
            model_sha256=digests[0],
            against=self.against,
            against_sha256=digests[1] if plan.base else None,
            limit=self.limit,
            batch_size=self.batch_size,
            dtype="the server's" if plan.server else _name(self.dtype or plan.checkpoint.dtype),
            device=str(plan.device),
            threads=torch.get_num_threads(),
            versions=_versions(bool(plan.tasks)),
            seconds=time.monotonic() - plan.start,
            text=text,
            tasks=tasks,
            recovery=mean_recovery(tasks),
            served=None if plan.server is None else plan.server.described(),
            notes=notes,
        )
        found = metrics(evaluation)
        if self.gate:
            evaluation = replace(evaluation, gate=self.gate.judge(found, _measured_on(evaluation)))
        if isinstance(progress, Callback):
            progress.on_metrics({name: measured.value for name, measured in found.items()})
        if self.out is not None:
            write_text(self.out, to_json(evaluation) + "\n")
        if self.html is not None:
            write_text(self.html, eval_page(evaluation, beside(self.html)))
        if self.markdown is not None:
            write_text(self.markdown, eval_markdown(evaluation))
        return evaluation

    @staticmethod
    def _notes(plan: EvalPlan) -> tuple[str, ...]:
        """What a reader of the result should know of the models."""
        if plan.base is None or not isinstance(plan.checkpoint, StoredCheckpoint):
            return ()
        note = origin_note(plan.base, plan.checkpoint)
        return () if note is None else (note,)

    def _text(self, plan: EvalPlan, windows: Windows, base_digest: str, progress: Progress) -> TextResult:
        dtype = self.dtype or torch.float32
        base = None
        if plan.base is not None:
            key = key_of(kind="hidden", model=base_digest, ids=windows.sha256(), shape=tuple(windows.ids.shape), **_facts(dtype, plan.device))
            hidden = kept_hidden(key)
            if hidden is None:
                report = _staged(progress, "base: text")
                hidden = hidden_states(plan.base, windows, dtype=dtype, device=plan.device, report=report)
                keep_hidden(key, hidden)
            base = BaseHidden(plan.base, hidden)
        report = _staged(progress, "compressed: text" if plan.base else "text")
        if plan.server is not None:
            return measure_served(plan.server, windows, base, dtype=dtype, device=plan.device, report=report)
        return measure_text(plan.checkpoint, windows, base, dtype=dtype, device=plan.device, report=report)

    def _base_answers(self, plan: EvalPlan, base: Checkpoint, digest: str, progress: Progress) -> tuple[list[Answers], frozenset[str]]:
        """Of every task, and the names of those that were kept."""
        if not plan.tasks:
            return [], frozenset()
        facts = {**_facts(self.dtype or base.dtype, plan.device), "batch_size": self.batch_size, "lm-eval": version("lm-eval")}
        keys = {task.name: key_of(kind="answers", model=digest, task=task.sha256, **facts) for task in plan.tasks}
        found = {name: kept for name, key in keys.items() if (kept := kept_answers(key)) is not None}
        cached, missing = frozenset(found), [task for task in plan.tasks if task.name not in found]
        new = self._answers(base, missing, plan.device, "base", progress, [keys[task.name] for task in missing])
        found |= {task.name: one for task, one in zip(missing, new, strict=True)}
        return [found[task.name] for task in plan.tasks], cached

    def _answers(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[Task],
        device: torch.device,
        which: str,
        progress: Progress,
        keys: Sequence[str] | None = None,
        server: Server | None = None,
    ) -> list[Answers]:
        """Load the model and run the tasks, one after the other, so that no task's batches depend on which others are run. keys: keep them so.
        server: ask it, in place of a model in memory."""
        if not tasks:
            return []
        from ..eval.tasks.harness import answers

        lm = self._loaded(checkpoint, device) if server is None else self._served(server, checkpoint)
        found = []
        for number, task in enumerate(tasks):
            lm.report = _staged(progress, f"{which}: {task.name}")
            found.append(answers(lm, task))
            if keys is not None:
                keep_answers(keys[number], found[-1])
        del lm
        trim()
        return found

    def _loaded(self, checkpoint: Checkpoint, device: torch.device) -> "LoadedLM":
        from ..eval.tasks.harness import LoadedLM

        if isinstance(checkpoint, StoredCheckpoint):
            checkpoint.check_finite()  # answers are picked by comparing, which NaN goes through unseen
        model = load(checkpoint.path, dtype=self.dtype, device=device, kernels="reference", allow_pickle=self.allow_pickle)
        return LoadedLM(model, checkpoint.tokenizer(), prefix=prefix_length(checkpoint), batch_size=self.batch_size)

    def _served(self, server: Server, checkpoint: Checkpoint) -> "ServedLM":
        from ..eval.tasks.served_lm import ServedLM

        longest = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        return ServedLM(server, checkpoint.tokenizer(), max_length=longest, batch_size=self.batch_size)


def _measured_on(evaluation: Evaluation) -> dict[str, str]:
    """The text and the tasks in words, by what is measured on them."""
    text, tasks = evaluation.text, ", ".join(task.name for task in evaluation.tasks)
    first = f"the first {evaluation.limit} documents of " if evaluation.limit else ""
    source = "" if text is None else "the built-in text" if text.source == "builtin" else text.source
    words = "" if text is None else f"{text.windows} x {text.length} tokens of {source}"
    return {**dict.fromkeys(COMPARED, words), **dict.fromkeys(("recovery", "accuracy"), f"{first}{tasks}")}


def prefix_length(checkpoint: Checkpoint) -> int:
    """Tokens that stand before every text of this model."""
    return len(checkpoint.extension.prefix) if isinstance(checkpoint, StoredCheckpoint) else 0


def task_result(task: Task, own: Answers, base: Answers | None, cached: bool) -> TaskResult:
    """A task's metrics, against the base model's where there is one."""
    found = {name: _metric(name, own, base) for name in own.values}
    main = next((name for name, metric in found.items() if metric.right_or_wrong), None)
    return TaskResult(
        name=task.name,
        version=task.version,
        samples=task.samples,
        shots=task.shots,
        sha256=task.sha256,
        main=main,
        metrics=found,
        base_cached=cached,
    )


def _metric(name: str, own: Answers, base: Answers | None) -> MetricResult:
    x = own.samples.get(name)
    yes_or_no = x is not None and {*x, *(() if base is None else base.samples[name])} <= {0.0, 1.0}
    return MetricResult(
        value=own.values[name],
        error=None if x is None else mean(x).error,
        higher_is_better=own.higher_is_better[name],
        right_or_wrong=yes_or_no,
        base=None if base is None else _paired(base.values[name], x, base.samples.get(name), yes_or_no),
    )


def _paired(value: float, x: Sequence[float] | None, y: Sequence[float] | None, yes_or_no: bool) -> MetricBase:
    if x is None or y is None:
        return MetricBase(value=value, error=None, difference=None, recovery=None, flips=None)
    share = ratio(x, y)
    percent = None if share is None else Measured(value=100 * share.value, error=None if share.error is None else 100 * share.error)
    return MetricBase(value=value, error=mean(y).error, difference=difference(x, y), recovery=percent, flips=flips(x, y) if yes_or_no else None)


def _staged(progress: Progress, name: str) -> Report:
    """Begins a stage when the first step is done, and again where the number of steps changes."""
    steps = 0

    def report(done: int, total: int) -> None:
        nonlocal steps
        if total != steps:
            steps = total
            progress.stage(name, total)
        progress.step(done)

    return report


def _facts(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What else decides last bits."""
    facts = {"dtype": _name(dtype), "device": device.type, "threads": torch.get_num_threads(), "machine": platform.machine(), **_versions(False)}
    return facts | {"gpu": device_name(device) if device.type == "cuda" else None}


def _versions(tasks: bool) -> dict[str, str]:
    return {name: version(name) for name in ("planish", "torch", "transformers", *(["lm-eval"] if tasks else []))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
