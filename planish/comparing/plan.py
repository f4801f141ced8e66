"""Before a comparison: recipes and texts are read, every recipe is planned, all that can be refused is, and it is known what it will take.

Shapes: ids (N, L) windows of token numbers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calib.data.windows import Calibration
from ..calib.files.checkpoint import Checkpoint, check_language, open_checkpoint
from ..common.decode import encode
from ..common.texts import BUILTIN
from ..eval.verifying.verify import evaluation_windows
from ..planning.estimate import LENGTH, Memory, products_per_second, resident
from ..planning.preflight import Plan, make_plan
from ..recipe.schema import Recipe, digest
from ..walk.looks import alike
from .report import Text

LIBRARIES = ("planish", "torch", "transformers", "compressed-tensors")
STARTING = 8.0  # seconds in which a process imports its libraries and plans


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonPlan:
    """What a comparison would do, and what it takes. plans: by the recipes' names. ids: of the texts. measuring: seconds for one model.
    waiting: bytes that this process holds while the recipes' processes work. jobs: these, at most, at once, each with so many
    threads."""

    checkpoint: Checkpoint
    plans: Mapping[str, Plan]
    texts: tuple[Text, ...]
    ids: tuple[Tensor, ...]
    measuring: float
    waiting: int
    jobs: int = 1
    threads: int = 1

    def seconds(self, names: Iterable[str]) -> float:
        """To compress with these recipes and measure, without the base model."""
        each = [self.plans[name].seconds + self.measuring + STARTING for name in names]
        return max(sum(each) / self.jobs, max(each, default=0.0))

    def most_memory(self, names: Iterable[str]) -> int:
        """Bytes that the processes of these recipes take together at their highest, as many at once as there are jobs."""
        return sum(sorted(map(self.memory, names))[-self.jobs :])

    def memory(self, name: str) -> int:
        """Bytes that the recipe's process takes at its highest."""
        plan = self.plans[name]
        return max(plan.memory.total, self._evaluation(plan.evaluation).total)

    def _evaluation(self, usual: Memory) -> Memory:
        """Of all texts, and of longer windows where they are longer."""
        return replace(usual, streams=2 * self.hidden_bytes, passing=int(usual.passing * max(1, max(text.length for text in self.texts) / LENGTH)))

    @property
    def hidden_bytes(self) -> int:
        """Of one model's final hidden states on all texts."""
        width: int = self.checkpoint.config.get_text_config().hidden_size
        return 4 * width * sum(text.windows * text.length for text in self.texts)

    def disk(self, names: Sequence[str], keep: bool) -> int:
        """Bytes needed for these recipes, at most at once."""
        plans = [self.plans[name] for name in names]
        own = sum(sorted(plan.disk - (plan.out_bytes if keep else 0) for plan in plans)[-self.jobs :])
        return own + (sum(plan.out_bytes for plan in plans) if keep else 0) + self.hidden_bytes + self._look_bytes(names)

    def sharing(self, names: Iterable[str]) -> dict[str, str]:
        """Those of these recipes that see the same in full precision as another of them, and a name for what they share."""
        seen = {name: one for name in names if (one := self._seen(self.plans[name])) is not None}
        counts = Counter(seen.values())
        return {name: one for name, one in seen.items() if counts[one] > 1}

    def _seen(self, plan: Plan) -> str | None:
        """What decides what a recipe sees; None if it takes no text."""
        if plan.ids is None or plan.recipe.calibration is None:
            return None
        parts = [sha256(plan.ids), plan.recipe.calibration.batch_size, [[type(step).__name__, encode(step)] for step in alike(plan.recipe.steps)]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _look_bytes(self, names: Iterable[str]) -> int:
        """Of all looks that these recipes share."""
        one = {key: self.plans[name] for name, key in self.sharing(names).items()}
        width: int = self.checkpoint.config.get_text_config().hidden_size
        counts = [0 if plan.ids is None else plan.ids.numel() * plan.topology.block_count * plan.dtype.itemsize for plan in one.values()]
        return width * sum(counts)

    def identities(self) -> dict[str, tuple[str, str | None]]:
        """By recipe, its digest and that of its calibration tokens."""
        return {name: (digest(plan.recipe), None if plan.ids is None else sha256(plan.ids)) for name, plan in self.plans.items()}

    def about(self) -> dict[str, Any]:
        """What makes it the same comparison, whatever its recipes."""
        plan = next(iter(self.plans.values()))
        return {
            "model": self.checkpoint.fingerprint(),
            "texts": {text.name: text.sha256 for text in self.texts},
            "arithmetic": str(plan.dtype).removeprefix("torch."),
            "device": plan.device.type,
            "threads": self.threads,
            "versions": {name: version(name) for name in LIBRARIES},
        }


def sha256(ids_NL: Tensor) -> str:
    """Of token numbers."""
    return hashlib.sha256(ids_NL.numpy().tobytes()).hexdigest()


def plan_comparison(
    recipes: Mapping[str, Recipe],
    model: str,
    texts: Mapping[str, str],
    *,
    windows: int,
    length: int,
    jobs: int = 1,
    device: str | None,
    dtype: torch.dtype | None,
    offload_dir: Path | None,
    allow_pickle: bool,
) -> ComparisonPlan:
    """Read the texts and plan each recipe; recipes with the same calibration share its tokens. Raises PlanishError for the first that is refused."""
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    check_language(checkpoint, "compress it")
    ids = {name: evaluation_windows(checkpoint, source, windows, length) for name, source in texts.items()}
    described = tuple(
        Text(name=name, source=texts[name], windows=ids_NL.shape[0], length=ids_NL.shape[1], sha256=sha256(ids_NL)) for name, ids_NL in ids.items()
    )
    tokens: dict[Calibration, Tensor] = {}
    plans: dict[str, Plan] = {}
    for name, recipe in recipes.items():
        text = None if recipe.calibration is None else replace(recipe.calibration, batch_size=1)
        plan = plans[name] = make_plan(
            recipe,
            checkpoint.path,
            device=device,
            dtype=dtype,
            offload_dir=offload_dir,
            allow_pickle=allow_pickle,
            ids_NL=None if text is None else tokens.get(text),
        )
        if text is not None and plan.ids is not None:
            tokens[text] = plan.ids
    where = next(iter(plans.values())).device
    products = sum(ids_NL.numel() for ids_NL in ids.values()) * checkpoint.nbytes / checkpoint.dtype.itemsize
    measuring = products / products_per_second(torch.float32, where)
    return ComparisonPlan(checkpoint, plans, described, tuple(ids.values()), measuring, resident(), jobs, torch.get_num_threads())


def notes(plan: ComparisonPlan) -> tuple[str, ...]:
    """What the reader of the figures should know of texts and calibration."""
    calibrations = {name: one.recipe.calibration for name, one in plan.plans.items()}
    found = []
    for text in plan.texts:
        names = ", ".join(name for name, calibration in calibrations.items() if calibration is not None and _same(calibration.source, text.source))
        if names and text.source == BUILTIN:
            found.append(f"{text.name} is what is kept for evaluation of the text that was calibrated on: {names}.")
        elif names:
            found.append(f"{text.name} is the very text that was calibrated on, which flatters: {names}.")
    if len(plan.texts) == 1:
        found.append("One text only: the columns for a second, of another kind than the calibration's, are left out. Give one with --text NAME=FILE.")
    kinds = {name: f"{one.samples} x {one.length} tokens of {one.source}, seed {one.seed}" for name, one in calibrations.items() if one is not None}
    if len(set(kinds.values())) > 1:
        what = "; ".join(f"{name} on {kind}" for name, kind in kinds.items())
        found.append(f"Not calibrated alike: {what}. --set calibration.source=... sets it for all, and so on.")
    return tuple(found)


def _same(one: str, other: str) -> bool:
    """Whether two text sources are the same."""
    return one == other or (
        not one.startswith("hub:") and BUILTIN not in (one, other) and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    )
