"""Any recipe is either refused, with nothing left behind, or ends in a checkpoint that computes what was measured, interrupted or not.

A few examples of the combinations that no other test writes down; raise EXAMPLES for a longer search.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import distance, ids, source
from helpers_front import tree
from hypothesis import given, settings
from hypothesis import strategies as st

import planish
from planish.common.decode import decode
from planish.eval.verifying.probe import read_probe
from planish.quant.errors import PlanishError
from planish.recipe.schema import Recipe
from planish.walk.records import BlockRecord

EXAMPLES = 10
FAMILIES = ("llama", "gpt_neox", "gemma2")
SITES = st.sampled_from((["*"], ["*.o", "*.down"], ["*.down"], ["0.*"]))
EARLY: tuple[list[Any], ...] = ([], [], ["fold_norms"], ["fold_norms", {"rotate": {"at": "residual"}}])
PREFIX = ({"prefix": {"tokens": [5, 7]}},)
ABSORBED = ({"smooth": {"strength": 0.5}}, {"smooth": {"sites": ["*.o"]}}, {"scale_rms": {"exponent": 0.5, "sites": ["*.o", "*.down"]}})
PERMUTE = ({"permute": {"block": 4}},)
VALUE = ({"rotate": {"at": "value"}}, {"rotate": {"at": "value", "kind": "learned", "steps": 1}})
INPUTS = ("shift", "hadamard", {"cat": {"block": 16}}, {"wush": {"block": 16}}, {"flat": {"steps": 1}}, {"flat": {"objective": "block", "steps": 1}})
KEEPING = ({"quad": {"rank": 4}}, "resq")
CLIP = ("clip",)
BESIDE = ({"low_rank": {"rank": 4}}, {"svdquant": {"rank": 4, "rounds": 1}})
SOLVERS = ("rtn", {"rtn": {"clip": {}}}, "gptq", {"gptq": {"damping": [0.01, 0.1], "order": "diagonal"}}, "gptaq", {"gptaq": {"beta": 0.2}})
WEIGHTS = ({"bits": 4}, {"bits": 8, "granularity": "tensor"}, {"bits": 3, "symmetric": False, "granularity": "group", "group_size": 16})
DYNAMIC = ({"bits": 8}, {"bits": 4, "symmetric": False}, {"bits": 4, "clip": 0.9}, {"bits": 8, "granularity": "group", "group_size": 16})
ACTIVATIONS = (*DYNAMIC, *DYNAMIC, None, {"bits": 8, "granularity": "tensor", "dynamic": False})  # few steps go with the last

FLOAT = {"bits": 8, "type": "float"}
FOUR = {"bits": 4, "type": "float", "granularity": "group", "group_size": 16}
FLOATS = (
    {"weights": FLOAT, "activations": FLOAT},
    {"weights": {**FLOAT, "granularity": "tensor"}},
    {"weights": FOUR, "activations": FOUR},
)  # no steps at inputs go with them


class Interrupting(planish.Callback):
    """Stops behind the first block."""

    def on_block(self, record: BlockRecord) -> None:
        raise KeyboardInterrupt


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe as YAML has it."""

    def one_or_none(of: tuple[Any, ...]) -> list[Any]:
        return [draw(st.sampled_from(of))] if draw(st.booleans()) else []

    def scheme() -> dict[str, Any]:
        whole = {"weights": draw(st.sampled_from(WEIGHTS)), "activations": draw(st.sampled_from(ACTIVATIONS))}
        return draw(st.sampled_from((whole, whole, whole, *FLOATS)))

    steps = one_or_none(PREFIX) + draw(st.sampled_from(EARLY))
    for of in (ABSORBED, PERMUTE, VALUE, INPUTS, KEEPING, CLIP, BESIDE):
        steps += one_or_none(of)
    steps += [{"polish": {"steps": 2, "sites": draw(SITES)}}] if draw(st.booleans()) else []
    overrides = [{"sites": ["*.down"], "keep": True}, {"sites": ["0.o"], "scheme": scheme()}]
    return {
        "name": "any",
        "calibration": {"samples": 5, "length": draw(st.sampled_from((8, 17))), "batch_size": 2},
        "steps": steps,
        "scheme": scheme(),
        "overrides": one_or_none(tuple(overrides)),
        "solver": draw(st.sampled_from(SOLVERS)),
        "kv_cache": draw(st.sampled_from((None, None, {"bits": 4}))),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("any")
    return {family: source(family, root / family, changes={"num_hidden_layers": 2}) for family in FAMILIES}


@pytest.mark.usefixtures("pythons_text")
@settings(max_examples=EXAMPLES, derandomize=True)
@given(st.sampled_from(FAMILIES), recipes())
def test_any_recipe(models: dict[str, Path], family: str, written: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(models[family], written, Path(folder))


@torch.no_grad()
def check(model: Path, written: dict[str, Any], folder: Path) -> None:
    try:
        recipe = decode(Recipe, written, "recipe any")
        planish.compress(recipe, model, folder / "out", dtype=torch.float32)
    except PlanishError:
        assert not tree(folder)
        return
    with pytest.raises(KeyboardInterrupt):
        planish.compress(recipe, model, folder / "again", dtype=torch.float32, callbacks=[Interrupting()])
    planish.compress(recipe, model, folder / "again", dtype=torch.float32)
    assert tree(folder / "again") == tree(folder / "out")
    assert planish.verify(folder / "out", stock=False).ok
    loaded, probe = planish.load(folder / "out", dtype=torch.float32, kernels="reference"), read_probe(folder / "out")
    assert probe is not None
    following = probe["input_ids"][:, 1:, None]
    found = loaded(probe["input_ids"]).logits.log_softmax(-1)[:, :-1].gather(2, following)[..., 0]
    torch.testing.assert_close(found, probe["next_logprobs"], rtol=1e-3, atol=1e-3)
    packed = planish.load(folder / "out", dtype=torch.float32, kernels="packed")
    assert distance(packed(ids()).logits, loaded(ids()).logits) < 0.05
