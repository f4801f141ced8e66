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
from .calib.shards import read_json
from .compression import Progress, Result, carry_out
from .eval.gate import Judgement
from .eval.measured import COMPARED, comparison_metrics
from .export import FOLDER, MANIFEST
from .journal import write_text
from .preflight import Plan, make_plan
from .quant.errors import PlanishError
from .recipe import Recipe, digest
from .report import Evaluation, evaluate, peak_bytes, report_path, run_report, to_json, windows


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A finished compression with its measurements. peak: memory in bytes before the evaluation. judgement: of the recipe's gate, if it has one."""

    result: Result
    evaluation: Evaluation | None
    peak: int
    judgement: Judgement | None
    report: Path
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the user asked for. The settings are those of `planish.compress`; evaluate: measure quality afterwards."""

    recipe: Recipe
    model: str
    out: Path
    device: str | None = None
    dtype: torch.dtype | None = None
    offload_dir: Path | None = None
    allow_pickle: bool = False
    evaluate: bool = True

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
        report = report_path(self.out)
        if report.exists() or report.is_symlink():
            raise PlanishError(f"{report}: exists, and planish overwrites nothing. Choose another output folder, or remove this file.")
        return plan, windows(plan) if self.evaluate else None

    def run(self, plan: Plan, ids_NL: Tensor | None, progress: Progress) -> Outcome:
        """Compress, evaluate on the windows, write the report."""
        try:
            result = carry_out(plan, self.out, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped(plan.topology.block_count)) from None
        peak = peak_bytes()
        try:
            evaluation = None if ids_NL is None else evaluate(result, ids_NL, progress)
        except KeyboardInterrupt:
            again = f"planish verify {self.out} --against {self.model}"
            raise KeyboardInterrupt(f"Stopped while evaluating. The checkpoint {self.out} is complete; `{again}` measures it.") from None
        judgement = self._judged(evaluation)
        data = run_report(result, self.model, peak, evaluation, judgement)
        write_text(report_path(self.out), to_json(data) + "\n")
        return Outcome(result, evaluation, peak, judgement, report_path(self.out), data)

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
    """Remove an earlier demonstration: a checkpoint that this recipe made of this model, and its report. Anything else is left where it is."""
    manifest = out / FOLDER / MANIFEST
    if manifest.is_file() and _sources(read_json(manifest)) == (digest(recipe), open_checkpoint(model).fingerprint()):
        shutil.rmtree(out)
    if not out.exists() and report_path(out).is_file() and read_json(report_path(out)).get("model") == model:
        report_path(out).unlink()


def _sources(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return manifest["recipe"]["sha256"], manifest["model"]["sha256"]
