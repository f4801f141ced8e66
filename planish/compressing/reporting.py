"""What a compression cost: sizes, quality on held-out text, time and memory, as one JSON file beside the checkpoint."""

import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..calib.compressed.packing import Packed
from ..calib.compressed.stored import open_stored
from ..calib.machine.heap import trim
from ..common.decode import encode
from ..eval.scores.gate import Judgement
from ..eval.scores.score import Comparison, Score, compare
from ..eval.verifying.verify import evaluation_windows
from ..planning.estimate import LENGTH, WINDOWS
from ..planning.preflight import Plan
from ..quant.formats import Scheme
from ..recipe.schema import digest
from ..walk.callbacks import Progress
from .compression import Result
from .report import ArithmeticReport, Bytes, CompressReport, EvaluationReport, Machine, PlanReport, ScoreReport, SiteFormat


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Base and compressed model on the same windows of the built-in text, in float32."""

    comparison: Comparison
    windows: int
    length: int
    seconds: float

    @property
    def words(self) -> str:
        """What it was measured on."""
        return f"{self.windows} x {self.length} tokens of the built-in text"

    def report(self) -> EvaluationReport:
        """With the numbers alone."""
        both = self.comparison
        return EvaluationReport(
            source="builtin, evaluation half",
            windows=self.windows,
            length=self.length,
            dtype="float32",
            seconds=self.seconds,
            base=_score(both.base),
            quantized=_score(both.quantized),
            kl=both.kl,
            agreement=both.agreement,
        )


def _score(score: Score) -> ScoreReport:
    return ScoreReport(nll=score.nll, perplexity=score.perplexity, tokens=score.tokens)


def windows(plan: Plan) -> Tensor:
    """The windows to evaluate on: (at most 4, at most 2048). Raises PlanishError if the model has no tokenizer."""
    return evaluation_windows(plan.checkpoint, "builtin", WINDOWS, LENGTH)


def evaluate(result: Result, ids_NL: Tensor, progress: Progress) -> Evaluation:
    """Both models on the windows, a block in memory at a time."""
    start = time.monotonic()
    plan = result.plan
    progress.stage("evaluating", 2 * plan.topology.block_count + 1)

    def step(done: int, _all: int) -> None:
        progress.step(done)
        trim()

    comparison = compare(plan.checkpoint, open_stored(result.out), ids_NL, device=plan.device, progress=step)
    return Evaluation(comparison, ids_NL.shape[0], ids_NL.shape[1], time.monotonic() - start)


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    Where Linux says it in /proc that is taken: getrusage starts a new program with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def plan_report(plan: Plan) -> PlanReport:
    """A plan as data."""
    return PlanReport(
        recipe=cast("dict[str, Any]", encode(plan.recipe, defaults=True)),
        model=str(plan.checkpoint.path),
        family=plan.topology.family,
        blocks=plan.topology.block_count,
        sites={
            name: tuple(SiteFormat(blocks=tuple(rows), **described(how)) for how, rows in by_scheme.items())
            for name, by_scheme in schemes(plan).items()
        },
        bytes=Bytes(before=plan.checkpoint.nbytes, after=plan.out_bytes),
        bits_per_weight=plan.bits_per_weight,
        arithmetic=ArithmeticReport(dtype=str(plan.dtype).removeprefix("torch."), device=str(plan.device)),
        memory={**asdict(plan.memory), "total": plan.memory.total},
        memory_evaluating={**asdict(plan.evaluation), "total": plan.evaluation.total},
        memory_writing=None if plan.writing is None else {**asdict(plan.writing), "total": plan.writing.total},
        prefix=plan.prefix,
        offload=plan.offload,
        replay=plan.replay,
        disk=plan.disk,
        seconds=plan.seconds,
        seconds_evaluating=plan.seconds_evaluating,
        servers=plan.servers,
        notes=plan.notes,
    )


def schemes(plan: Plan) -> dict[str, dict[Packed | None, list[int]]]:
    """For every site, how it is stored in which blocks. None: in full precision."""
    found: dict[str, dict[Packed | None, list[int]]] = {name: {} for name in plan.topology.site_names}
    for (block, name), how in plan.packed.items():
        found[name].setdefault(how, []).append(block)
    return found


def described(how: Packed | None) -> dict[str, str | None]:
    """A site's formats in words."""
    if how is None:
        return {"weights": None, "activations": None, "layout": None}
    return {**_formats(how.scheme), "layout": how.layout}


def _formats(scheme: Scheme) -> dict[str, str | None]:
    weights, activations = scheme.weights, scheme.activations
    assert weights is not None
    group = f"group of {weights.group_size}" if weights.group_size else weights.granularity
    words = f"{weights.name} per {group}{'' if weights.symmetric else ', asymmetric'}"
    if activations is None:
        return {"weights": words, "activations": None}
    group = f"group of {activations.group_size}" if activations.group_size else activations.granularity
    kind = ("" if activations.dynamic else ", static") + ("" if activations.symmetric else ", asymmetric")
    return {"weights": words, "activations": f"{activations.name} per {group}{kind}"}


def report_path(out: Path) -> Path:
    """Where the report of the checkpoint `out` lies."""
    return out.with_name(out.name + ".report.json")


def page_path(out: Path) -> Path:
    """Where the page of it lies, unless another place was asked for."""
    return out.with_name(out.name + ".report.html")


def run_report(
    result: Result, model: str, peak: tuple[int, int | None], evaluation: Evaluation | None, judgement: Judgement | None = None
) -> CompressReport:
    """Everything that is known of a finished compression. peak: memory in bytes, of the process and on the device."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "compressed-tensors")}}
    return CompressReport(
        planish=version("planish"),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        model_sha256=result.plan.checkpoint.fingerprint(),
        recipe_sha256=digest(result.plan.recipe),
        checkpoint=str(result.out.absolute()),
        bytes=Bytes(before=result.plan.checkpoint.nbytes, after=result.stored_bytes),
        bits_per_weight=result.bits_per_weight,
        evaluation=None if evaluation is None else evaluation.report(),
        gate=judgement,
        seconds=result.seconds,
        peak_bytes=peak[0],
        device_peak_bytes=peak[1],
        machine=Machine(platform=platform.platform(), cpus=os.cpu_count(), threads=torch.get_num_threads(), versions=versions),
        blocks=result.blocks,
        plan=plan_report(result.plan),
    )
