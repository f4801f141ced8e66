"""One compression as the command line does it: plan, compress, evaluate, report."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calib.files.checkpoint import Checkpoint, open_checkpoint
from ..calib.files.shards import read_json
from ..calib.machine.device import taken_bytes
from ..common.decode import decode
from ..common.files import BusyError, write_text
from ..common.outfile import check_apart, check_outfile
from ..common.page_links import beside
from ..common.schemas import plain, to_json
from ..eval.scores.gate import Judgement, kind
from ..eval.scores.measured import COMPARED, comparison_metrics
from ..planning.preflight import Plan, make_plan
from ..quant.errors import PlanishError
from ..recipe.schema import Recipe, digest
from ..walk.callbacks import Progress
from .compression import Result, carry_out, fingerprint
from .export import FOLDER, MANIFEST
from .page import compress_page, markdown
from .report import CompressReport
from .reporting import Evaluation, evaluate, page_path, peak_bytes, report_path, run_report, windows


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A finished compression with its measurements, and the files that say so."""

    result: Result
    evaluation: Evaluation | None
    report: CompressReport
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the user asked for. The settings are those of `planish.compress`; evaluate: measure quality afterwards. html: the page's file, by default
    beside the checkpoint; markdown: a file for it, if it is wanted."""

    recipe: Recipe
    model: str
    out: Path
    device: str | None = None
    dtype: torch.dtype | None = None
    offload_dir: Path | None = None
    allow_pickle: bool = False
    evaluate: bool = True
    html: Path | None = None
    markdown: Path | None = None

    @property
    def page(self) -> Path:
        """The page's file."""
        return self.html or page_path(self.out)

    @property
    def files(self) -> tuple[Path, ...]:
        """That will be written, besides the checkpoint."""
        return (report_path(self.out), self.page, *([] if self.markdown is None else [self.markdown]))

    def plan(self) -> tuple[Plan, Tensor | None]:
        """The plan, and the windows of text to evaluate on. Raises PlanishError for all that can be refused beforehand."""
        self._check_gate()
        page = {"--html": self.html} if self.html is not None else {"the page": self.page}
        check_apart({"--out": self.out, "the report": report_path(self.out), **page, "--markdown": self.markdown})
        plan = make_plan(
            self.recipe,
            self.model,
            device=self.device,
            dtype=self.dtype,
            offload_dir=self.offload_dir,
            out=None if self._compressed else self.out,
            allow_pickle=self.allow_pickle,
        )
        if self._compressed:
            self._kept(plan)
        self._check_files()
        return plan, windows(plan) if self.evaluate else None

    def _check_gate(self) -> None:
        """PlanishError if a threshold is about what will not be measured."""
        measured = COMPARED if self.evaluate else ()
        missing = next((name for name in self.recipe.gate.thresholds() if name not in measured), None)
        if missing is None:
            return
        without = f"--set gate.{kind(missing)}=null leaves out what the recipe asks for."
        if self.evaluate:
            where, instead = "planish compress", f"planish eval measures it, with the task, once the checkpoint is there; {without}"
        else:
            where, instead = "planish compress --no-evaluate", f"Leave out --no-evaluate; or {without}"
        self.recipe.gate.check_measured(measured, where, instead)

    def run(self, plan: Plan, ids_NL: Tensor | None, progress: Progress) -> Outcome:
        """Compress, evaluate on the windows, write the report. What is compressed already is only evaluated."""
        if self._compressed:
            progress.say("going on: the checkpoint is complete, and its report is left to do")
        else:
            try:
                carry_out(plan, self.out, progress, finished=partial(self._keep, fingerprint(plan)))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._stopped(plan.topology.block_count)) from None
        with self._alone():
            report = self._kept(plan)
            self._check_files()
            result = Result(self.out, plan, report.blocks, report.seconds, report.bytes.after, report.bits_per_weight)
            try:
                evaluation = None if ids_NL is None else evaluate(result, ids_NL, progress)
            except KeyboardInterrupt:
                without = "" if self.recipe.gate else "; with --no-evaluate it writes the report without"
                raise KeyboardInterrupt(f"Stopped while evaluating. {self._complete} goes on with the evaluation{without}.") from None
            if evaluation is not None:
                report = replace(report, evaluation=evaluation.report(), gate=self._judged(evaluation))
            self._write(report)
        return Outcome(result, evaluation, report, self.files)

    def _write(self, report: CompressReport) -> None:
        """All files; then nothing is left to do."""
        write_text(report_path(self.out), to_json(report) + "\n")
        write_text(self.page, compress_page(report, beside(self.page)))
        if self.markdown is not None:
            write_text(self.markdown, markdown(report))
        _waiting(self.out).unlink()

    def _check_files(self) -> None:
        """PlanishError if a file cannot be written, or is there."""
        for file in self.files:
            if file in (self.html, self.markdown):
                check_outfile(file, advice="Choose another name, or remove this file.")
            elif file.exists() or file.is_symlink():
                raise PlanishError(f"{file}: exists, and planish overwrites nothing. Choose another output folder, or remove this file.")

    @property
    def _compressed(self) -> bool:
        """Whether a run that got as far as the checkpoint has left its report to do."""
        return self.out.is_dir() and _waiting(self.out).is_file()

    def _keep(self, mark: str, result: Result) -> None:
        """Note all that is known of the compression, for the report, and which run it was."""
        report = run_report(result, self.model, (peak_bytes(), taken_bytes(result.plan.device)), None)
        write_text(_waiting(self.out), json.dumps({"fingerprint": mark, "report": plain(report)}) + "\n")

    def _kept(self, plan: Plan) -> CompressReport:
        """What was noted. PlanishError if another run did, or the checkpoint is another one's."""
        file, manifest = _waiting(self.out), self.out / FOLDER / MANIFEST
        data = read_json(file) if file.is_file() and manifest.is_file() else {}
        if not data or data.get("fingerprint") != fingerprint(plan) or _sources(read_json(manifest)) != _made_of(plan.recipe, plan.checkpoint):
            left = " Its report is still to be written: the command that made it, unchanged, goes on with that." if data else ""
            raise PlanishError(f"{self.out}: exists, and planish overwrites nothing. Choose another output folder, or remove this one.{left}")
        return decode(CompressReport, data["report"], str(file), nonfinite=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else evaluates this checkpoint while the `with` lasts; BusyError if somebody does."""
        with _waiting(self.out).open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"{self.out}: another planish is evaluating it. Wait for it, or choose another output folder.") from None
            yield

    def _judged(self, evaluation: Evaluation) -> Judgement | None:
        return self.recipe.gate.judge(comparison_metrics(evaluation.comparison), evaluation.words) if self.recipe.gate else None

    @property
    def _complete(self) -> str:
        return f"The checkpoint {self.out} is complete, and the same command"

    def _stopped(self, blocks: int) -> str:
        if self._compressed:
            return f"Stopped. {self._complete} writes its report."
        folder = _working(self.out)
        file = folder / "journal.json"
        done = len(json.loads(file.read_text(encoding="utf-8"))["blocks"]) if file.is_file() else 0
        if not done:
            return "Stopped before the first block was done."
        return f"Stopped. {done} of {blocks} blocks are done, in {folder}: the same command goes on from there."


def _waiting(out: Path) -> Path:
    """What is known of the finished checkpoint `out` until its report is written: the report without an evaluation, and which run it is of."""
    return out.with_name(out.name + ".report.json.partial")


def _working(out: Path) -> Path:
    """Where the compression works."""
    return out.with_name(out.name + ".partial")


def clear_demo(out: Path, recipe: Recipe, model: str) -> None:
    """Remove an earlier demonstration: a checkpoint that this recipe made of this model, and its reports. Anything else is left where it is, and so
    is one that is still to be evaluated."""
    manifest = out / FOLDER / MANIFEST
    if _waiting(out).is_file() and out.exists():
        return
    if manifest.is_file() and _sources(read_json(manifest)) == _made_of(recipe, open_checkpoint(model)):
        shutil.rmtree(out)
    if not out.exists() and report_path(out).is_file() and read_json(report_path(out)).get("model") == model:
        report_path(out).unlink()
        page_path(out).unlink(missing_ok=True)


def _made_of(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, str]:
    """What the manifest of their checkpoint has as `_sources`."""
    return digest(recipe), checkpoint.fingerprint()


def _sources(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return manifest["recipe"]["sha256"], manifest["model"]["sha256"]
