"""Recipes: what to do to a model, as YAML or as Python objects, the same thing.

YAML: the keys are the fields of `Recipe`; a step or solver is written as its name, or as a mapping of its name to its settings.
Which sites a pattern means: see resolve.py.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from ..calib.compressed.packing import other_grid
from ..calib.data.windows import Calibration
from ..common.decode import Named, decode, encode
from ..common.yamltext import dump_yaml, parse_yaml
from ..eval.scores.gate import Gate
from ..quant.errors import PlanishError
from ..quant.formats import NVFP4, Scheme
from ..quant.key_values import HeldKeyValues, KvCache
from ..quant.solvers import SOLVERS, Gptq, Solver
from ..quant.transforms import STEPS, Center, Flat, Lorc, Polish, Prefix, RaiseActivations, ScaleRms, Smooth, Step, SuperWeights, Svdquant
from ..quant.transforms.rotate import rotation_at
from .shipped import check_recipe, shipped_texts
from .shipped import shipped as shipped
from .shipped import shipped_text as shipped_text
from .steporder import check_order, needs_text, portable, step_name

SAME_INPUTS = (Center, Prefix, Lorc, Svdquant, SuperWeights)  # a site's range is that which was seen, but for a shift, which its scale is told of

NamedStep: TypeAlias = Annotated[Step, Named(STEPS)]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]i?)?B")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """Another scheme at the sites that a pattern matches: in place of the recipe's, not merged with it. keep: full precision there."""

    sites: tuple[str, ...]
    scheme: Scheme | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.sites:
            raise PlanishError('override: sites is empty. Give patterns such as "*.down" or "0.*".')
        if (self.scheme is not None) == self.keep:
            raise PlanishError("override: give either scheme, or keep: true to leave the sites in full precision.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The written checkpoint. format: compressed-tensors, to which planish adds what that cannot say, where a recipe needs it (docs/serving.md).

    layout auto: one code a byte (int-quantized) where activations are quantized, packed where they are not and wherever planish alone runs the
    checkpoint; of floats float-quantized. shard_size: of one file at most, such as 5GB or 500MiB.
    """

    format: Literal["compressed-tensors"] = "compressed-tensors"
    layout: Literal["auto", "int-quantized", "pack-quantized"] = "auto"
    shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.shard_bytes < 10**6:
            raise PlanishError(f"export.shard_size is {self.shard_size}, but a shard has at least 1MB.")

    @property
    def shard_bytes(self) -> int:
        """shard_size in bytes."""
        found = _SIZE.fullmatch(self.shard_size)
        if found is None:
            raise PlanishError(f"export.shard_size is {self.shard_size!r}, but a size is a number and a unit: 5GB, 500MB, 2GiB.")
        return int(float(found[1]) * _UNITS[found[2] or ""])


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to do to a model. Steps run in their order; of overrides that match a site the last one holds.

    calibration: None where nothing needs text. group_fallback: what to do where the scheme's group size does not divide a layer's input channels:
    refuse; divisor: the largest smaller size that does and that servers run (128, 64, 32), per channel if there is none; channel: per channel.
    kv_cache: how keys and values are held while text is generated, None: as they are. gate: what the result must meet; it has no part in the result.
    """

    name: str
    description: str = ""
    calibration: Calibration | None = Calibration()
    steps: tuple[NamedStep, ...] = ()
    scheme: Scheme
    overrides: tuple[Override, ...] = ()
    group_fallback: Literal["refuse", "divisor", "channel"] = "refuse"
    solver: Annotated[Solver, Named(SOLVERS)]
    kv_cache: KvCache | None = None
    export: Export = Export()
    gate: Gate = Gate()

    def __post_init__(self) -> None:
        _check_objects(self.steps, self.solver)
        if all(scheme.weights is None for scheme in self.schemes()):
            raise PlanishError("scheme quantizes nothing. Give scheme.weights, such as {bits: 8}.")
        activations = [scheme.activations for scheme in self.schemes() if scheme.activations]
        check_order(self.steps)
        if self.kv_cache is None and rotation_at(self.steps, "keys") is not None:
            raise PlanishError(
                "steps: rotate at keys is for keys that are held in few bits, and here they are not. Add kv_cache, or remove the step."
            )
        scalers = [step_name(step) for step in self.steps if isinstance(step, (Smooth, ScaleRms))]
        if scalers and not activations:
            raise PlanishError(
                f"steps: {scalers[0]} makes activations easier to quantize, but none are quantized. Remove it, or add scheme.activations."
            )
        users = {
            **{f"the step {step_name(step)}": needs_text(step) for step in self.steps},
            f"the solver {_name(self.solver, SOLVERS)}": self.solver.needs_moments,
            "a static activation scale": any(activation.calibrated for activation in activations),
        }
        mixing = [
            step_name(step) for step in self.steps if not (portable(step) or isinstance(step, SAME_INPUTS) or step is rotation_at(self.steps, "keys"))
        ]
        if any(not activation.dynamic for activation in activations) and mixing:
            raise PlanishError(
                f"scheme: static scales do not know what {mixing[0]} makes of inputs at run time. Set dynamic: true, or use steps that weights "
                "absorb, shift, prefix, low_rank, svdquant or super_weight."
            )
        dynamic = all(act.dynamic and act.type == "int" for act in activations)
        if any(isinstance(step, RaiseActivations) for step in self.steps) and not (activations and dynamic):
            raise PlanishError(
                "steps: raise_activations measures what dynamic integers lose, but here some activations are static, floats, or none are quantized. "
                "Remove it, or set scheme.activations with dynamic: true."
            )
        fours = any(scheme.weights is not None and scheme.weights.kind == NVFP4 for scheme in self.schemes())
        if fours and any(isinstance(step, Polish) for step in self.steps):
            raise PlanishError("steps: polish moves scales by less than NVFP4's are apart. Remove it, or use integers.")
        if self.calibration is None and any(users.values()):
            needing = " and ".join(user for user, needs in users.items() if needs)
            raise PlanishError(f"calibration is null, but {needing} cannot do without. Remove the line to use the built-in text.")
        if self.calibration is not None and self.calibration.samples <= self.calibration.batch_size:
            users = {
                "solver: settings are to be chosen": bool(self.solver.held_share),
                "steps: polish is to be judged": any(isinstance(step, Polish) for step in self.steps),
                "steps: flat with objective block is to be judged": any(isinstance(step, Flat) and step.objective == "block" for step in self.steps),
            }
            for user in (user for user, holds_out in users.items() if holds_out):
                raise PlanishError(
                    f"{user} by text that is held out, but calibration has one batch, of {self.calibration.samples} samples. "
                    "Give more samples, or a smaller batch_size."
                )

    @property
    def extended(self) -> bool:
        """Whether planish alone computes what the checkpoint says: inputs are transformed or clipped, or have a prefix, or keys and values are
        held in codes; or the formats are such that others load them and compute something else."""
        activations = [scheme.activations for scheme in self.schemes() if scheme.activations is not None]
        learned = any(isinstance(step, Polish) and step.clip for step in self.steps) and any(act.dynamic for act in activations)
        clips = learned or any(act.clip != 1 for act in activations)
        return clips or self.misread is not None or self.kv_cache is not None or not all(portable(step) for step in self.steps)

    @property
    def misread(self) -> str | None:
        """Which of the formats others would load, and compute something else without a word."""
        activations = [scheme.activations for scheme in self.schemes() if scheme.activations is not None]
        if any(map(other_grid, activations)):
            return "transformers scales symmetric dynamic activations of fewer than 8 bits otherwise (symmetric: false is the same everywhere)"
        if activations and self.export.layout == "pack-quantized":
            return "vLLM leaves quantized activations in full precision where export.layout is pack-quantized (auto is for others)"
        return None

    def held_key_values(self, prefix: int) -> HeldKeyValues | None:
        """How keys and values are held behind so many tokens of a prefix."""
        return None if self.kv_cache is None else HeldKeyValues(self.kv_cache, rotation_at(self.steps, "keys") is not None, prefix)

    def schemes(self) -> tuple[Scheme, ...]:
        """All that occur: the recipe's, then its overrides'."""
        return self.scheme, *(override.scheme for override in self.overrides if override.scheme)


def _check_objects(steps: object, solver: object) -> None:
    """PlanishError for names or mappings, as YAML has them, where Python has objects."""
    if not isinstance(solver, tuple(SOLVERS.values())):
        kind = SOLVERS.get(str(solver), Gptq)
        raise PlanishError(f"solver is {solver!r}; in Python give planish.{kind.__name__}(). Names are for recipes in YAML.")
    if not isinstance(steps, (tuple, list)):
        raise PlanishError(f"steps is {steps!r}; in Python give a tuple of steps, such as (planish.Smooth(),).")
    for step in steps:
        if not isinstance(step, tuple(STEPS.values())):
            name = STEPS.get(str(step), Smooth).__name__
            raise PlanishError(f"steps has {step!r}; in Python give planish.quant.transforms.{name}(...). Names are for recipes in YAML.")
    if isinstance(steps, list):
        raise PlanishError("steps is a list; in Python give a tuple of steps, such as (planish.Smooth(),).")


def _name(chosen: object, classes: Mapping[str, type]) -> str:
    return next(name for name, kind in classes.items() if kind is type(chosen))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The shipped recipe of that name, or the one in that YAML or JSON file. Raises PlanishError with the place of what is wrong."""
    check_recipe(name_or_path)
    if str(name_or_path) in shipped_texts():
        return _read(shipped_texts()[str(name_or_path)], f"recipe {name_or_path}")
    path = Path(name_or_path)
    try:
        return _read(path.read_text(encoding="utf-8"), f"recipe {path}")
    except UnicodeDecodeError as error:
        raise PlanishError(f"recipe {path}: not a text file in UTF-8.") from error


def to_yaml(recipe: Recipe, *, defaults: bool = False) -> str:
    """A YAML file that `load_recipe` reads as this recipe. defaults: spell out every setting."""
    return dump_yaml(encode(recipe, defaults=defaults))


def digest(recipe: Recipe) -> str:
    """SHA-256 (hex) of the recipe's canonical JSON, the gate left out, for it judges what the rest makes; equal recipes have equal digests."""
    canonical = encode(decode(Recipe, encode(recipe), f"recipe {recipe.name}"))  # decoded once: strength=1 and strength=1.0 are equal recipes
    assert isinstance(canonical, dict)
    del canonical["gate"]
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(text: str, root: str) -> Recipe:
    data = parse_yaml(text, root)
    if data is None:
        raise PlanishError(f"{root}: is empty. See `planish recipes show w8a8` for one that is not.")
    return decode(Recipe, data, root)


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with `path=value` settings, such as `calibration.samples=64`, `solver.gptq.damping=0.05` or `scheme.activations=null`.

    path: keys, list positions from 0, or in a list of steps a step's name. value: YAML. All are set before the whole is checked,
    as strictly as a file; raises PlanishError.
    """
    data: object = encode(recipe)
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign or not all(path.split(".")):
            raise PlanishError(f"{setting!r} is not a setting. Write path=value, such as calibration.samples=64.")
        value = text if text.startswith("*") else parse_yaml(text, setting)  # a site pattern; in YAML the star would be an alias
        data = _put(data, path.split("."), value, setting)
    return decode(Recipe, data, f"recipe {recipe.name} with {' '.join(settings)}") if settings else recipe


def _put(node: object, keys: list[str], value: object, setting: str) -> object:
    """A copy of plain data with the value at the path. What the path says beyond the known keys is left to the decoder to refuse."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        index = _index(node, key, setting)
        below = rest if key.isdecimal() else keys
        return [_put(item, below, value, setting) if i == index else item for i, item in enumerate(node)]
    if node is None or node == key:  # a bare name stands for a mapping of that name to its defaults
        node = {}
    if not isinstance(node, dict):
        raise PlanishError(f"{setting}: there is nothing named {key} inside {node}.")
    return {**node, key: _put(node.get(key), rest, value, setting)}


def _index(items: list[object], key: str, setting: str) -> int:
    if key.isdecimal():
        found = [int(key)] if int(key) < len(items) else []
    else:
        found = [i for i, item in enumerate(items) if item == key or (isinstance(item, dict) and key in item)]
    if len(found) != 1:
        raise PlanishError(f"{setting}: {key} stands for {len(found)} items of a list of {len(items)}. Positions count from 0.")
    return found[0]
