"""A comparison: the base model goes over the texts once, each recipe has a process of its own, what is done is kept and at the end written up."""

import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..calib.machine.device import free_bytes, give_back
from ..calib.machine.heap import trim
from ..calib.machine.workers import threads
from ..common.decode import decode
from ..common.files import locked
from ..common.outfile import check_comparison
from ..common.page_links import beside
from ..common.schemas import to_json
from ..common.texts import named_texts
from ..common.units import duration
from ..eval.scores.reference import make_reference
from ..eval.scores.score import Comparison
from ..planning.preflight import AVAILABLE_SHARE, check_room
from ..quant.errors import PlanishError
from ..recipe.schema import Recipe
from ..recipe.variants import named_recipes
from ..walk.callbacks import Progress, Silent
from .child import IDS, Task
from .folder import Folder
from .lanes import side_by_side
from .page import comparison_page
from .parent import Started, run_child
from .pareto import COSTS, WITHIN, front, picks
from .plan import ComparisonPlan, notes, plan_comparison
from .report import Base, ComparisonReport, Done, Quality, Row
from .text import markdown, picture, quality_words


def compare(
    recipes: Sequence[Recipe | str | Path],
    model: str | Path,
    out: str | Path,
    *,
    texts: Sequence[str] = (),
    windows: int = 4,
    length: int = 2048,
    settings: Sequence[str] = (),
    vary: Sequence[str] = (),
    jobs: int = 1,
    within: float = WITHIN,
    keep: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Compress `model` with each recipe, measure all of them on the same texts, and write the comparison into the folder `out`.

    recipes: each as of `planish.compress`. texts: NAME=SOURCE, besides the built-in text's half for evaluation; windows and length: at most so much
    of each. settings: PATH=VALUE, for all recipes. vary: PATH=V1,V2: every recipe in every combination of these values. jobs: recipes at once, among
    which the threads are shared out, as far as memory goes. within: the rise of perplexity up to which a recipe is picked as smallest or quickest,
    0.05 being five percent. keep: leave the compressed checkpoints in out/checkpoints. The others: as of `planish.compress`.
    Every recipe runs in a process of its own. The same call after an interruption goes on where it was; `out` must not exist otherwise.
    Raises PlanishError, for what is wrong with any of the recipes before the first one runs.
    """
    job = CompareJob(
        recipes=named_recipes(recipes, settings, vary),
        model=str(model),
        out=Path(out),
        texts=named_texts(texts),
        windows=windows,
        length=length,
        jobs=jobs,
        within=within,
        keep=keep,
        device=device,
        dtype=dtype,
        offload_dir=None if offload_dir is None else Path(offload_dir),
        allow_pickle=allow_pickle,
    )
    return job.run(job.plan(), progress or Silent())


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareJob:
    """What the user asked for. recipes and texts by name, the others as of `compare`."""

    recipes: Mapping[str, Recipe]
    model: str
    out: Path
    texts: Mapping[str, str]
    windows: int = 4
    length: int = 2048
    jobs: int = 1
    within: float = WITHIN
    keep: bool = False
    device: str | None = None
    dtype: torch.dtype | None = None
    offload_dir: Path | None = None
    allow_pickle: bool = False

    @property
    def folder(self) -> Folder:
        """Where it goes."""
        return Folder(self.out)

    def plan(self) -> ComparisonPlan:
        """Plan all recipes. Raises PlanishError for all that can be refused beforehand."""
        if self.jobs < 1 or not self.within >= 0:
            raise PlanishError(f"jobs is {self.jobs} and within {self.within}, but at least one job runs, and perplexity may rise by 0 or more.")
        check_comparison(self.out)
        with self._threads():
            plan = plan_comparison(
                self.recipes,
                self.model,
                self.texts,
                windows=self.windows,
                length=self.length,
                jobs=self.jobs,
                device=self.device,
                dtype=self.dtype,
                offload_dir=self.offload_dir,
                allow_pickle=self.allow_pickle,
            )
        self.folder.check(plan.about(), plan.identities())
        pending = self.pending(plan)
        check_room({self.out: plan.disk(pending, self.keep)} if pending else {})
        return plan

    def pending(self, plan: ComparisonPlan) -> list[str]:
        """The recipes that are not done yet."""
        done = self.folder.done()
        return [name for name in plan.plans if name not in done or (self.keep and not self.folder.checkpoint(name).exists())]

    def run(self, plan: ComparisonPlan, progress: Progress) -> ComparisonReport:
        """Do what is pending, and write the comparison."""
        self.folder.create(plan.about())
        with locked(self.folder.working):
            pending = self.pending(plan)
            try:
                with self._threads():
                    self._measure_all(plan, pending, progress)
            except KeyboardInterrupt:
                left = len(self.pending(plan))
                words = f"{len(plan.plans) - left} of {len(plan.plans)} recipes are done, in {self.out}: the same command goes on from there."
                raise KeyboardInterrupt(f"Stopped. {words}") from None
            report = self._report(plan)
            page = comparison_page(report, beside(self.folder.page))
            self.folder.finish(page, to_json(report) + "\n", markdown(report), picture(report))
        return report

    def _threads(self) -> AbstractContextManager[None]:
        """Each job's share of the threads, with which also the base model runs: what is computed depends on nothing else."""
        return threads(max(1, torch.get_num_threads() // self.jobs))

    def _measure_all(self, plan: ComparisonPlan, pending: Sequence[str], progress: Progress) -> None:
        if not pending:
            return
        if len(pending) < len(plan.plans):
            progress.say(f"going on: {len(plan.plans) - len(pending)} of {len(plan.plans)} recipes are done")
        self._reference(plan, progress)
        sharing = plan.sharing(pending)
        tasks = {name: self._task(plan, name, sharing.get(name)) for name in pending}

        def measure(name: str, lane: Progress, started: Started) -> Done:
            return self._measure(plan, name, tasks[name], lane, started)

        start, over = time.monotonic(), list[str]()
        needs = {name: plan.memory(name) for name in pending}
        give_back(device := next(iter(plan.plans.values())).device)  # what planning took
        room = int(free_bytes(device) * AVAILABLE_SHARE)
        steps = 2 * next(iter(plan.plans.values())).topology.block_count + 1
        lanes = side_by_side(measure, pending, jobs=self.jobs, needs=needs, room=room, steps=steps, progress=progress)
        with closing(lanes) as results:
            for name, done in results:
                over.append(name)
                slower = (time.monotonic() - start) / plan.seconds(over)
                rest = [name for name in pending if name not in over]
                if name in sharing and not any(sharing.get(other) == sharing[name] for other in rest):
                    shutil.rmtree(self.folder.looks(sharing[name]), ignore_errors=True)  # of no more use
                left = f", about {duration(slower * plan.seconds(rest))} left" if rest else ""
                words = "; ".join(f"{text} {quality_words(quality)}" for text, quality in done.row.quality.items())
                progress.say(f"{name}: {words} ({len(plan.plans) - len(rest)} of {len(plan.plans)} recipes{left})")

    def _reference(self, plan: ComparisonPlan, progress: Progress) -> None:
        """The base model's hidden states, unless they are there."""
        if self.folder.reference.exists():
            return
        device = next(iter(plan.plans.values())).device
        blocks = next(iter(plan.plans.values())).topology.block_count
        progress.stage("full precision: texts", blocks)

        def step(done: int, _all: int) -> None:
            progress.step(done)
            trim()

        make_reference(plan.checkpoint, plan.ids, device=device, report=step).save(self.folder.reference)
        trim()
        give_back(device)  # the recipes' processes need it

    def _measure(self, plan: ComparisonPlan, name: str, task: Task, progress: Progress, started: Started) -> Done:
        """One recipe, in its own process; its result is kept before its checkpoint goes where it belongs."""
        found = run_child(task, progress, started)
        done = self._done(plan, name, found)
        self.folder.add(name, done)
        if self.keep:
            self.folder.checkpoint(name).parent.mkdir(exist_ok=True)
            Path(task.out).rename(self.folder.checkpoint(name))
        else:
            shutil.rmtree(task.out)
        Path(task.clock).unlink()
        return done

    def _task(self, plan: ComparisonPlan, name: str, shared: str | None) -> Task:
        one, (sha, ids_sha) = plan.plans[name], plan.identities()[name]
        own = self.folder.working / f"{name}-{sha[:8]}"  # another recipe of this name may have been interrupted here
        ids = None if ids_sha is None else self.folder.working / f"calibration-{ids_sha[:16]}.safetensors"
        if ids is not None and one.ids is not None:
            save_file({IDS: one.ids}, ids)  # no process reads it yet
        return Task(
            recipe=one.recipe,
            model=str(plan.checkpoint.path),
            out=str(own),
            ids=None if ids is None else str(ids),
            reference=str(self.folder.reference),
            clock=f"{own}.clock.json",
            looks=None if shared is None else str(self.folder.looks(shared)),
            device=str(one.device),
            dtype="bfloat16" if one.dtype is torch.bfloat16 else "float32",
            offload_dir=None if self.offload_dir is None else str(self.offload_dir),
            allow_pickle=self.allow_pickle,
            threads=plan.threads,
        )

    def _done(self, plan: ComparisonPlan, name: str, found: Mapping[str, Any]) -> Done:
        one, (sha, ids_sha) = plan.plans[name], plan.identities()[name]
        comparisons = [decode(Comparison, data, f"result of {name}", nonfinite=True) for data in found["texts"]]
        by_text = dict(zip((text.name for text in plan.texts), comparisons, strict=True))
        row = Row(
            recipe=name,
            description=one.recipe.description,
            sha256=sha,
            calibration_sha256=ids_sha,
            bits_per_weight=found["bits_per_weight"],
            bytes=found["bytes"],
            seconds=found["seconds"],
            peak_bytes=found["peak_bytes"],
            resumed=found["resumed"],
            servers=one.servers,
            notes=one.notes,
            quality={text: Quality.of(comparison) for text, comparison in by_text.items()},
            checkpoint=str(self.folder.checkpoint(name).absolute()) if self.keep else None,
        )
        return Done(row=row, base={text: comparison.base.perplexity for text, comparison in by_text.items()})

    def _report(self, plan: ComparisonPlan) -> ComparisonReport:
        done, one, about = self.folder.done(), next(iter(plan.plans.values())), plan.about()
        perplexity = next(iter(done.values())).base
        rows = tuple(done[name].row for name in plan.plans)
        return ComparisonReport(
            planish=version("planish"),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=self.model,
            model_sha256=about["model"],
            family=one.topology.family,
            blocks=one.topology.block_count,
            arithmetic=about["arithmetic"],
            device=about["device"],
            platform=platform.platform(),
            threads=about["threads"],
            jobs=self.jobs,
            versions=about["versions"],
            texts=plan.texts,
            base=Base(bits=8 * plan.checkpoint.dtype.itemsize, bytes=plan.checkpoint.nbytes, perplexity=perplexity),
            rows=rows,
            fronts={what: front(rows, cost) for what, cost in COSTS.items()},
            picks=picks(rows, self.within),
            notes=notes(plan),
        )
