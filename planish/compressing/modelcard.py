"""The README.md of a compressed checkpoint: what it is, how it was made, what it costs, how to run it."""

from collections.abc import Sequence
from importlib.metadata import version

from ..calib.files.checkpoint import auto_class
from ..planning.preflight import Plan
from ..recipe.schema import to_yaml
from ..serving import VLLM_FAMILIES
from ..walk.records import BlockRecord


def model_card(plan: Plan, blocks: Sequence[BlockRecord], stored: int, bits: float) -> str:
    """Markdown with the header that model hubs read."""
    before = plan.checkpoint.nbytes
    name = plan.checkpoint.path.name
    errors = [block.error for block in blocks if block.error is not None]
    rows = [
        ("recipe", plan.recipe.name),
        ("size", f"{stored / 1e6:.1f} MB of {before / 1e6:.1f} MB ({stored / before:.0%})"),
        ("bits per quantized weight", f"{bits:.2f}, scales and transforms included"),
        ("runs as measured in", ", ".join(plan.servers)),
        *([("relative error of the last block's output", f"{errors[-1]:.4f}")] if errors else []),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    notes = "".join(f"- {note}\n" for note in plan.notes) + ("\n" if plan.notes else "")
    return (
        f"---\nbase_model: {name}\nlibrary_name: transformers\ntags:\n- planish\n- compressed-tensors\n---\n\n"
        f"# {name}, compressed with planish {version('planish')} ({plan.recipe.name})\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"{notes}"
        "Perplexity and divergence from the original: `planish verify THIS_FOLDER --against ORIGINAL`.\n\n"
        f"## Use\n\n{_use(plan)}\n\nErrors of every block, versions and digests: planish/manifest.json.\n\n"
        f"## Recipe\n\n```yaml\n{to_yaml(plan.recipe)}```\n"
    )


def _use(plan: Plan) -> str:
    """How to run it, in the consumers that do."""
    if plan.servers == ("planish",):
        server = (
            "" if plan.checkpoint.config.model_type not in VLLM_FAMILIES else ", and so does `vllm serve THIS_FOLDER` with planish in its environment"
        )
        return (
            "Only with planish installed (`pip install planish`); other software refuses the folder.\n\n"
            '```python\nimport planish\n\nmodel = planish.load("THIS_FOLDER")\n```\n\n'
            f"After that import `{_auto(plan)}.from_pretrained` does the same{server}."
        )
    line, call = "import planish", "planish.load"
    if "transformers" in plan.servers:
        line, call = f"from transformers import {_auto(plan)}", f"{_auto(plan)}.from_pretrained"
    return f'```python\n{line}\n\nmodel = {call}("THIS_FOLDER")\n```{_vllm(plan)}'


def _auto(plan: Plan) -> str:
    """The class of transformers that opens it."""
    return str(auto_class(plan.checkpoint.config).__name__)


def _vllm(plan: Plan) -> str:
    """What serves it, if anything does."""
    device = next((name.removeprefix("vLLM").strip(" ()") for name in plan.servers if name.startswith("vLLM")), None)
    if device is None:
        return ""
    elsewhere = (
        "; elsewhere add `--quantization planish`, with planish in its environment" if plan.checkpoint.config.model_type in VLLM_FAMILIES else ""
    )
    return "\n\nor `vllm serve THIS_FOLDER`" + (f" on a {device}{elsewhere}." if device else ".")
