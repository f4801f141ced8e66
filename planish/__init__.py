"""planish: flattens a language model's outliers, then quantizes it.

    import planish

    recipe = planish.load_recipe("w8a8")
    planish.compress(recipe, "path/to/model", "path/to/new/folder")
    model = planish.load("path/to/new/folder")

Once it is imported, transformers' own from_pretrained loads these folders too. The names below are imported when they are first used, so that
`import planish` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .loading.registration import register

if TYPE_CHECKING:
    from .calib.compressed.packed import kernels_used
    from .calib.data.windows import Calibration
    from .calib.outliers.diagnosis import OutlierReport, Thresholds
    from .comparing.job import compare
    from .comparing.report import ComparisonReport
    from .compressing.compression import Result, compress
    from .eval.scores.evaluation import Evaluation
    from .eval.scores.gate import Gate
    from .eval.scores.layers import LayerView
    from .eval.verifying.verify import verify
    from .evaluating.job import evaluate
    from .inspecting.inspection import inspect
    from .layerwise.view import layers
    from .loading.model import load
    from .planning.preflight import Plan
    from .planning.preflight import make_plan as plan
    from .quant.errors import PlanishError
    from .quant.formats import ActivationFormat, Scheme, WeightFormat
    from .quant.solvers import Clip, Gptaq, Gptq, Rtn
    from .quant.transforms import Smooth
    from .recipe.schema import Export, Override, Recipe, load_recipe
    from .searching.search import SearchResult, search
    from .walk.callbacks import Callback

    __version__: str

__all__ = [
    "ActivationFormat",
    "Calibration",
    "Callback",
    "Clip",
    "ComparisonReport",
    "Evaluation",
    "Export",
    "Gate",
    "Gptaq",
    "Gptq",
    "LayerView",
    "OutlierReport",
    "Override",
    "Plan",
    "PlanishError",
    "Recipe",
    "Result",
    "Rtn",
    "Scheme",
    "SearchResult",
    "Smooth",
    "Thresholds",
    "WeightFormat",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "inspect",
    "kernels_used",
    "layers",
    "load",
    "load_recipe",
    "plan",
    "search",
    "verify",
]

# No module of this package may have the name of a public function: once imported, it would hide the function.
_HOMES = {
    "calib.data.windows": ["Calibration"],
    "calib.outliers.diagnosis": ["OutlierReport", "Thresholds"],
    "calib.compressed.packed": ["kernels_used"],
    "comparing.job": ["compare"],
    "comparing.report": ["ComparisonReport"],
    "compressing.compression": ["Result", "compress"],
    "eval.scores.evaluation": ["Evaluation"],
    "eval.scores.gate": ["Gate"],
    "eval.scores.layers": ["LayerView"],
    "eval.verifying.verify": ["verify"],
    "evaluating.job": ["evaluate"],
    "inspecting.inspection": ["inspect"],
    "layerwise.view": ["layers"],
    "loading.model": ["load"],
    "planning.preflight": ["Plan", "make_plan"],
    "quant.errors": ["PlanishError"],
    "quant.formats": ["ActivationFormat", "Scheme", "WeightFormat"],
    "quant.solvers": ["Clip", "Gptaq", "Gptq", "Rtn"],
    "quant.transforms": ["Smooth"],
    "recipe.schema": ["Export", "Override", "Recipe", "load_recipe"],
    "searching.search": ["SearchResult", "search"],
    "walk.callbacks": ["Callback"],
}
_RENAMED = {"plan": "make_plan"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("planish")
    there = _RENAMED.get(name, name)
    home = next(module for module, names in _HOMES.items() if there in names)
    value = getattr(importlib.import_module(f".{home}", __name__), there)
    globals()[name] = value
    return value


register()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
