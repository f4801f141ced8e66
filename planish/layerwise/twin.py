"""The full-precision twin of a compressed checkpoint: the original model with everything in its weights that the compression's steps put there.

A site of the twin has the same input as in the checkpoint, rotated, scaled or in another order as it may be, and its readers are what the codes stand
for. It is made by doing the recipe's steps again, up to the solver; the norms and all else that the checkpoint holds in full precision show whether
that came out the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calib.blocks.sites import BlockTopology
from ..calib.compressed.stored import StoredCheckpoint
from ..calib.data.windows import Calibration
from ..calib.files.shards import read_json
from ..calib.walk.runner import BlockRunner
from ..calib.walk.stream import relative_error
from ..compressing.absorbed import AbsorbedBlocks
from ..compressing.export import FOLDER, MANIFEST
from ..eval.verifying.origin import check_made_from
from ..planning.preflight import make_plan
from ..quant.errors import PlanishError
from ..quant.formats import Scheme, WeightFormat
from ..quant.solvers import Rtn
from ..quant.transforms import Permute, Prefix, RaiseActivations, Rotate, ScaleRms, SideStep, Smooth, Step
from ..recipe.resolve import Address, matches
from ..recipe.schema import Recipe, load_recipe
from ..recipe.steporder import needs_text, of_the_whole
from ..walk.callbacks import Progress

TOLERANCE = 0.02  # relative difference of a norm's weights; rounding to bfloat16 makes 0.002, another strength of smoothing 0.1 and more

_OTHER = (
    "the checkpoint has other values than its recipe makes of this model. Give the model that was compressed, the same calibration text and the same "
    "version of planish; where the recipe learns rotations, also the device that it was compressed on."
)


def twin_of(
    stored: StoredCheckpoint, model: str | Path, device: torch.device, *, allow_pickle: bool, progress: Progress, kept: Path
) -> AbsorbedBlocks:
    """The twin's blocks. model: the original, as compress takes it. kept: a folder where what is learned for it is kept for the next.

    A checkpoint without planish's recipe is taken to have the original's weights in codes, nothing else. Raises PlanishError: as make_plan; steps
    whose text is gone. `check_twin` says whether a block is right.
    """
    file = stored.path / FOLDER / "recipe.yaml"
    recipe = load_recipe(file) if file.is_file() else _bare("none", ())
    plan = make_plan(_absorbing(recipe, stored), model, device=str(device), dtype=_arithmetic(stored), allow_pickle=allow_pickle)
    check_made_from(plan.checkpoint, stored)
    return AbsorbedBlocks(plan, progress, plan.offload_dir, kept)


def check_start(twin: AbsorbedBlocks, ids_NL: Tensor, hidden_NLD: Tensor) -> None:
    """PlanishError if what the checkpoint makes of these tokens before its first block is not what the twin makes of them: another rotation."""
    ((expected_NLD, _),) = BlockRunner(twin.runner.checkpoint, torch.float32, twin.runner.device).start([ids_NL])
    if not relative_error(expected_NLD, hidden_NLD) <= TOLERANCE:
        raise PlanishError(f"the embeddings: {_OTHER}")


def check_twin(twin: nn.Module, block: nn.Module, known: BlockTopology, name: str) -> None:
    """PlanishError if what a block holds in full precision beside its sites' readers is not what the twin has."""
    readers = tuple(f"{path}." for site in known.sites for path in site.readers)
    there = dict(block.named_parameters())
    for path, parameter in twin.named_parameters():
        if path.startswith(readers) or path not in there:
            continue
        expected, found = parameter.detach().float(), there[path].detach().float()
        if expected.shape != found.shape or float((expected - found).norm()) > TOLERANCE * float(expected.norm()):
            raise PlanishError(f"{name}.{path}: {_OTHER}")


def _absorbing(recipe: Recipe, stored: StoredCheckpoint) -> Recipe:
    """Those of the recipe's steps that weights absorb, and what these are chosen by."""
    known = stored.extension.prefix
    steps = [step for step in _decided(recipe.steps, stored) if _matters(step)]
    steps = [replace(step, tokens=known) if isinstance(step, Prefix) else step for step in steps if known or not isinstance(step, Prefix)]
    if any(isinstance(step, (Smooth, ScaleRms, Permute)) for step in steps):
        return replace(recipe, steps=tuple(steps))
    absorbed = tuple(step for step in steps if of_the_whole(step) or (isinstance(step, Rotate) and step.at == "value"))
    return _bare(recipe.name, absorbed, recipe.calibration if any(needs_text(step) for step in absorbed) else None)


def _decided(steps: Sequence[Step], stored: StoredCheckpoint) -> Iterator[Step]:
    """The steps, those that searched a site's setting with the one that was found: another device or number of threads might find another."""
    sites = {(block["index"], name): site for block in _manifest(stored).get("blocks", ()) for name, site in block["sites"].items()}
    for step in steps:
        if isinstance(step, Smooth) and step.strength == "auto":
            yield from (replace(step, strength=value, sites=names) for value, names in _by_value(step, "strength", sites))
        elif isinstance(step, ScaleRms) and step.exponent == "auto":
            yield from (replace(step, exponent=value, sites=names) for value, names in _by_value(step, "exponent", sites))
        else:
            yield step


def _by_value(step: Smooth | ScaleRms, setting: str, sites: Mapping[Address, Mapping[str, Any]]) -> Iterable[tuple[float, tuple[str, ...]]]:
    """The sites that the step has scaled, by the setting's value."""
    names: dict[float, tuple[str, ...]] = {}
    for (block, name), site in sites.items():
        if site.get(setting) is not None and matches(step.sites, block, name):
            names[site[setting]] = (*names.get(site[setting], ()), f"{block}.{name}")
    return names.items()


def _manifest(stored: StoredCheckpoint) -> dict[str, Any]:
    file = stored.path / FOLDER / MANIFEST
    return dict(read_json(file)) if file.is_file() else {}


def _arithmetic(stored: StoredCheckpoint) -> torch.dtype | None:
    """What the compression computed in, if it is known: its choices hang on it."""
    manifest = _manifest(stored)
    dtype = manifest["arithmetic"]["dtype"] if manifest else None
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}[dtype]


def _matters(step: Step) -> bool:
    """Whether what weights absorb can depend on the step."""
    return not isinstance(step, (SideStep, RaiseActivations))


def _bare(name: str, steps: tuple[Step, ...], calibration: Calibration | None = None) -> Recipe:
    """A recipe whose scheme and solver are of no matter."""
    return Recipe(name=name, calibration=calibration, steps=steps, scheme=Scheme(weights=WeightFormat(bits=8)), solver=Rtn())
