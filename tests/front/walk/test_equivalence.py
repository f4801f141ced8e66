"""Every step that transforms, on every family: before anything is rounded, float32 outputs are within 1e-5 of what they were, relative.

Side paths take a part of the weight and add it back: test_side.py. Queries and keys behind RoPE: test_key_values.py.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers_compress import STEPS, quick, source
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, RELATIVES

import planish
from planish.quant.errors import PlanishError

ALONE = ("shift", "hadamard", "duquant", "cat", "wush", "flat", "scale_rms", "permute", "R2", "smooth")  # any of them go together, in any order
WEIGHTS_ALONE = ("untie", "R2'")  # exact, or seen in the checkpoint only
NORMS_BEHIND = ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4")
LAYER_NORMS = ("gpt2", "opt", "gpt_neox", "nemotron", "starcoder2", "stablelm")
NEW = ("qwen3_moe-some", "glm4_moe", "deepseek_v3", "deepseek_v3-direct", "lfm2", "qwen3_5_text", "granite", "nemotron")  # of the RELATIVES
GATED = ("qwen3_5_text", "qwen3_5_moe_text")
FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver.gptaq.alpha=0")


def refusal(family: str, step: str) -> str | None:
    """Why this model cannot have it, as the error says."""
    if family == "opt-350m" and step.startswith(("R1", "fold_norms")):
        return "the residual stream itself is normalised after every layer|a LayerNorm stays one only"
    if family in GATED and step.startswith("R2") and step != "R2'":
        return "a gate stands between the values and o|kind: learned, is for models whose blocks all have attention"
    if family in ("lfm2", *GATED) and step == "R2, learned":
        return "kind: learned, is for models whose blocks all have attention"
    if family in NORMS_BEHIND and step.startswith("R1"):
        return "norms stand behind the layers that write to the stream"
    if family.startswith(LAYER_NORMS) and step == "R1, learned":
        return "a LayerNorm stays one only under rotations that keep the mean"
    return None


def errors(family: str, steps: str, folder: Path) -> list[float]:
    """Of every block, and of what was absorbed before the blocks."""
    model = folder / "model"
    if not model.exists():
        source(family, model, torch.float32)
    out = folder / f"out-{len(list(folder.iterdir()))}"
    result = planish.compress(quick("w4a4-best", f"steps=[{steps}]", *FINE), model, out)
    fused = json.loads((out / "planish" / "manifest.json").read_text(encoding="utf-8")).get("fused")
    return [*(block.equivalence for block in result.blocks), *(fused["errors"].values() if fused else ())]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CONFIGS, *NEW])
def test_every_step_on_every_family(family: str, tmp_path: Path) -> None:
    for step, steps in STEPS.items():
        reason = refusal(family, step)
        if reason is None:
            found = errors(family, steps, tmp_path)
            assert max(found) <= 1e-5, step
            assert max(found) > 0 or step in WEIGHTS_ALONE, step
        else:
            with pytest.raises(PlanishError, match=reason):
                errors(family, steps, tmp_path)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(family=st.sampled_from(sorted(CONFIGS | RELATIVES)), names=st.lists(st.sampled_from(ALONE), min_size=2, max_size=4, unique=True))
def test_steps_in_any_order(family: str, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    assume(all(refusal(family, name) is None for name in names))
    assert max(errors(family, ", ".join(STEPS[name] for name in names), tmp_path_factory.mktemp("any"))) <= 1e-5
