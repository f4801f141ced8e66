"""One compression as the command line does it: plan, compress, evaluate, report."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calib.checkpoint import open_checkpoint
from .calib.device import taken_bytes
from .calib.shards import read_json
from .compress_page import compress_page, markdown
from .compress_report import CompressReport
from .compression import Progress, Result, carry_out
from .eval.gate import Judgement
from .eval.measured import COMPARED, comparison_metrics
from .export import FOLDER, MANIFEST
from .journal import write_text
from .outfile import check_outfile
from .page_links import beside
from .preflight import Plan, make_plan
from .quant.errors import PlanishError
from .recipe import Recipe, digest
from .report import Evaluation, evaluate, page_path, peak_bytes, report_path, run_report, windows
from .schemas import to_json


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
        if self.evaluate:
            self.recipe.gate.check_measured(COMPARED, "planish compress", "Ask planish eval for it, with the task, once the checkpoint is there.")
        else:
            self.recipe.gate.check_measured((), "planish compress --no-evaluate", "Leave out --no-evaluate, or the gate.")
        plan = make_plan(
            self.recipe,
            self.model,
            device=self.device,
            dtype=self.dtype,
            offload_dir=self.offload_dir,
            out=self.out,
            allow_pickle=self.allow_pickle,
        )
        for file in self.files:
            if file in (self.html, self.markdown):
                check_outfile(file, advice="Choose another name, or remove this file.")
            elif file.exists() or file.is_symlink():
                raise PlanishError(f"{file}: exists, and planish overwrites nothing. Choose another output folder, or remove this file.")
        return plan, windows(plan) if self.evaluate else None

    def run(self, plan: Plan, ids_NL: Tensor | None, progress: Progress) -> Outcome:
        """Compress, evaluate on the windows, write the report."""
        try:
            result = carry_out(plan, self.out, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped(plan.topology.block_count)) from None
        peak = peak_bytes(), taken_bytes(plan.device)
        try:
            evaluation = None if ids_NL is None else evaluate(result, ids_NL, progress)
        except KeyboardInterrupt:
            again = f"planish verify {self.out} --against {self.model}"
            raise KeyboardInterrupt(f"Stopped while evaluating. The checkpoint {self.out} is complete; `{again}` measures it.") from None
        report = run_report(result, self.model, peak, evaluation, self._judged(evaluation))
        write_text(report_path(self.out), to_json(report) + "\n")
        write_text(self.page, compress_page(report, beside(self.page)))
        if self.markdown is not None:
            write_text(self.markdown, markdown(report))
        return Outcome(result, evaluation, report, self.files)

    def _judged(self, evaluation: Evaluation | None) -> Judgement | None:
        if evaluation is None or not self.recipe.gate:
            return None
        return self.recipe.gate.judge(comparison_metrics(evaluation.comparison), evaluation.words)

    def _stopped(self, blocks: int) -> str:
        if self.out.exists():
            return f"Stopped. The checkpoint {self.out} is complete."
        folder = self.out.with_name(self.out.name + ".partial")
        file = folder / "journal.json"
        done = len(json.loads(file.read_text(encoding="utf-8"))["blocks"]) if file.is_file() else 0
        if not done:
            return "Stopped before the first block was done."
        return f"Stopped. {done} of {blocks} blocks are done, in {folder}: the same command goes on from there."


def clear_demo(out: Path, recipe: Recipe, model: str) -> None:
    """Remove an earlier demonstration: a checkpoint that this recipe made of this model, and its reports. Anything else is left where it is."""
    manifest = out / FOLDER / MANIFEST
    if manifest.is_file() and _sources(read_json(manifest)) == (digest(recipe), open_checkpoint(model).fingerprint()):
        shutil.rmtree(out)
    if not out.exists() and report_path(out).is_file() and read_json(report_path(out)).get("model") == model:
        report_path(out).unlink()
        page_path(out).unlink(missing_ok=True)


def _sources(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return manifest["recipe"]["sha256"], manifest["model"]["sha256"]
