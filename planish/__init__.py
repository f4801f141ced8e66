"""planish: flattens a language model's outliers, then quantizes it.

    import planish

    recipe = planish.load_recipe("w8a8")
    planish.compress(recipe, "path/to/model", "path/to/new/folder")
    model = planish.load("path/to/new/folder")

The names below are imported when they are first used, so that `import planish` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calib.data import Calibration as Calibration
    from .compress import Result as Result
    from .compress import compress as compress
    from .eval.verify import verify as verify
    from .loading import load as load
    from .plan import Plan as Plan
    from .plan import make_plan as plan
    from .quant.errors import PlanishError as PlanishError
    from .quant.formats import ActivationFormat as ActivationFormat
    from .quant.formats import Scheme as Scheme
    from .quant.formats import WeightFormat as WeightFormat
    from .quant.solvers import Clip as Clip
    from .quant.solvers import Gptaq as Gptaq
    from .quant.solvers import Gptq as Gptq
    from .quant.solvers import Rtn as Rtn
    from .quant.transforms import Smooth as Smooth
    from .recipe import Export as Export
    from .recipe import Override as Override
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe

    __version__: str

_HOMES = {
    "ActivationFormat": "quant.formats.ActivationFormat",
    "Calibration": "calib.data.Calibration",
    "Clip": "quant.solvers.Clip",
    "Export": "recipe.Export",
    "Gptaq": "quant.solvers.Gptaq",
    "Gptq": "quant.solvers.Gptq",
    "Override": "recipe.Override",
    "Plan": "plan.Plan",
    "PlanishError": "quant.errors.PlanishError",
    "Recipe": "recipe.Recipe",
    "Result": "compress.Result",
    "Rtn": "quant.solvers.Rtn",
    "Scheme": "quant.formats.Scheme",
    "Smooth": "quant.transforms.Smooth",
    "WeightFormat": "quant.formats.WeightFormat",
    "compress": "compress.compress",
    "load": "loading.load",
    "load_recipe": "recipe.load_recipe",
    "plan": "plan.make_plan",
    "verify": "eval.verify.verify",
}
"""Where each public name lives. No module of this package may have the name of one of its functions: importing it would hide the function."""

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("planish")
    if name not in _HOMES:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
