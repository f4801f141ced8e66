"""Keys and values in codes, from recipe to checkpoint to text: R3 changes nothing by itself, what is stored computes what was measured, text that is
generated sees what a forward pass sees, and others refuse the checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, outlying, quick, source

import planish
from planish.calib.compressed.key_values import hold, holding
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.quant.errors import PlanishError
from planish.quant.key_values import HeldKeyValues, KvCache
from planish.recipe.schema import Recipe, load_recipe, to_yaml, with_settings

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"]
STEPS = '[{"prefix":{"tokens":[5]}},{"shift":{}},{"rotate":{"at":"keys"}}]'


def held_recipe(*settings: str) -> Recipe:
    return quick("w4a4-fast", f"steps={STEPS}", "kv_cache.bits=4", *settings)


def outputs(family: str, folder: Path, held: HeldKeyValues | None) -> torch.Tensor:
    """Of a tiny model's first block in float32."""
    runner = BlockRunner(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    ((hidden, call),) = runner.start([ids()])
    block = runner.load_block(0)
    with holding(block, runner.topology.block(0), held):
        return call.run(block, 0, hidden)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_turning_alone_changes_nothing_and_rounding_does(family: str, tmp_path: Path) -> None:
    folder = source(family, tmp_path / "model")
    exact, cache = outputs(family, folder, None), KvCache(bits=2)
    assert distance(outputs(family, folder, HeldKeyValues(cache, rotated=True, first=1000)), exact) < 1e-5
    assert distance(outputs(family, folder, HeldKeyValues(KvCache(bits=8), rotated=True)), exact) < 0.02
    assert distance(outputs(family, folder, HeldKeyValues(cache)), exact) > 1e-3


@torch.no_grad()
def test_what_was_held_is_let_go(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(source("llama", tmp_path / "model")), torch.float32, torch.device("cpu"))
    ((hidden, call),) = runner.start([ids()])
    block = runner.load_block(0)
    before, config = call.run(block, 0, hidden), block.self_attn.config  # type: ignore[union-attr]
    for held in (HeldKeyValues(KvCache()), HeldKeyValues(KvCache(bits=2)), None):
        hold(block, runner.topology.block(0), held)
    assert block.self_attn.config is config  # type: ignore[union-attr]
    assert torch.equal(call.run(block, 0, hidden), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_generated_text_sees_what_a_forward_pass_sees(family: str, tmp_path: Path) -> None:
    """The compression's own check has held the stored checkpoint against memory; here token by token, through the cache, against all at once."""
    planish.compress(held_recipe(), source(family, tmp_path / "model"), tmp_path / "out")
    model, text = planish.load(tmp_path / "out", dtype=torch.float32), ids(1, 12)
    whole = model(text).logits
    first = model(text[:, :7], use_cache=True)
    past, pieces = first.past_key_values, [first.logits]
    for i in range(7, 12):
        pieces.append(model(text[:, i : i + 1], past_key_values=past, use_cache=True).logits)
    assert distance(torch.cat(pieces, dim=1), whole) < 2e-3
    held = open_stored(tmp_path / "out").extension.held
    assert held == HeldKeyValues(KvCache(bits=4), rotated=True, first=1)


def test_keys_and_values_are_in_what_the_solver_sees(tmp_path: Path) -> None:
    """Coarser codes make the blocks' measured errors larger."""
    model = outlying(tmp_path / "model")
    errors = [planish.compress(held_recipe(f"kv_cache.bits={bits}"), model, tmp_path / f"out{bits}").blocks[-1].error for bits in (8, 2)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]


def test_a_polished_and_a_learned_model_can_hold_them(tmp_path: Path) -> None:
    steps = '[{"rotate":{"at":"keys"}},{"flat":{"objective":"block","structure":"blocks","block":8,"steps":3}},{"polish":{"steps":3}}]'
    done = planish.compress(held_recipe(f"steps={steps}", "calibration.samples=6"), outlying(tmp_path / "model"), tmp_path / "out")
    assert all(block.polished is not None for block in done.blocks)


def test_others_refuse_it_and_older_readers_too(tmp_path: Path) -> None:
    recipe = held_recipe('steps=[{"rotate":{"at":"keys"}}]', "solver=rtn")
    assert recipe.extended
    planish.compress(recipe, source("llama", tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["planish"]["version"] == 2
    assert config["quantization_config"]["quant_method"] == "planish"


def test_yaml_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(held_recipe()), encoding="utf-8")
    assert load_recipe(path) == held_recipe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("kv_cache=null",), "steps: rotate at keys is for keys that are held in few bits"),
        (('steps=[{"rotate":{"at":"keys","kind":"orthogonal"}}]',), "queries and keys are turned by a Hadamard"),
        (('steps=[{"rotate":{"at":"keys"}},{"rotate":{"at":"keys"}}]',), "rotate at keys is given twice"),
    ],
)
def test_what_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        with_settings(held_recipe(), settings)


def test_windows_that_move_past_a_prefix_are_refused(tmp_path: Path) -> None:
    model = source("gemma2", tmp_path / "model")
    with pytest.raises(PlanishError, match="kv_cache: this model's attention has windows"):
        planish.compress(held_recipe(), model, tmp_path / "out")
