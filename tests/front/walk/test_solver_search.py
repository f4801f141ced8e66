"""Settings that held-out text chooses, from the recipe to the record: what is read, refused, counted and taken down."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers_compress import quick, source
from helpers_front import tree
from helpers_solvers import inputs

import planish
from planish.calib.blocks.sites import Site
from planish.calib.walk.site_walk import Pass
from planish.planning.preflight import make_plan
from planish.quant.solvers import Gptaq, Moments
from planish.recipe.schema import digest, load_recipe, to_yaml, with_settings
from planish.walk.records import BlockRecord
from planish.walk.solving import Readers, gather, held_batches

LIST = "solver.gptaq.alpha=[0, 0.25, 1]"


def test_a_list_is_read_and_written(tmp_path: Path) -> None:
    recipe = with_settings(load_recipe("w4a4-best"), [LIST, "solver.gptaq.damping=[0.01, 0.1]", "solver.gptaq.held_out=0.125"])
    assert isinstance(recipe.solver, Gptaq)
    assert (recipe.solver.alpha, recipe.solver.damping, recipe.solver.held_share) == ((0.0, 0.25, 1.0), (0.01, 0.1), 0.125)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert digest(recipe) != digest(with_settings(recipe, ["solver.gptaq.damping=0.01"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["solver.gptaq.held_out=0.5"], "solver.held_out is 0.5, but nothing is to be chosen"),
        (["solver.gptaq.alpha=[0.5]"], "at least 2 numbers"),
        (["solver.gptaq.alpha=[0, 2]"], "alpha is 2.0, but it is the part"),
        (["solver.gptaq.alpha=[0, x]"], "solver.gptaq.alpha.1: expected a number"),
        ([LIST, "calibration.samples=4", "calibration.batch_size=4"], "calibration has one batch, of 4 samples"),
    ],
)
def test_refused(settings: list[str], message: str) -> None:
    with pytest.raises(planish.PlanishError) as caught:
        with_settings(load_recipe("w4a4-best"), settings)
    assert message in str(caught.value)


def test_how_many_batches() -> None:
    assert [held_batches(batches, 0.25) for batches in (2, 3, 4, 16, 17)] == [1, 1, 1, 4, 4]
    assert held_batches(3, 0.99) == 2
    assert held_batches(16, 0.0) == 0


class Standing:
    """Passes that stand at a site already."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def arrivals(self, _site: str, _then: object = None) -> Iterator[Pass]:
        return iter([Pass(lambda: torch.empty(0), x=x_TC) for x_TC in self.batches])


def test_the_last_batches_are_held_out_of_everything_else() -> None:
    """The moments are those of the first three batches, the held-out ones those of the last."""
    quant, full = ([inputs(6, 12, seed + add).float() for seed in range(4)] for add in (0, 50))
    readers = Readers(Site(name="qkv", readers=("q",)), None, None, {"q": torch.ones(5, 12)}, {"q": None}, {})
    keep_T = [torch.ones(6, dtype=torch.bool)] * 4
    found = gather(readers, Standing(quant), keep_T, Standing(full), 0.25)  # type: ignore[arg-type]
    first = gather(readers, Standing(quant[:3]), keep_T[:3], Standing(full[:3]))  # type: ignore[arg-type]
    last = gather(readers, Standing(quant[3:]), keep_T[3:], Standing(full[3:]))  # type: ignore[arg-type]
    assert first.held_out is None
    assert found.held_out is not None
    for ours, theirs in ((found, first), (found.held_out, last)):
        assert same(ours, theirs)


def same(one: Moments, other: Moments) -> bool:
    assert one.cross_II is not None
    assert other.cross_II is not None
    return torch.equal(one.second_II, other.second_II) and torch.equal(one.cross_II, other.cross_II) and one.tokens == other.tokens


def test_choices_are_taken_down_and_read_again(tmp_path: Path) -> None:
    """In every site's record, as JSON too; the same from memory and from disk."""
    folder, how = source("llama", tmp_path / "model"), quick("w4a8", LIST, "solver.gptaq.beta=[0, 0.1]")
    result = planish.compress(how, folder, tmp_path / "out", dtype=torch.float32)
    for block in result.blocks:
        for site in block.sites.values():
            assert set(site.settings) == {"alpha", "beta"}
            assert len(site.judged) == 6
            assert site.judged[f"beta={site.settings['beta']:g} alpha={site.settings['alpha']:g}"] == min(site.judged.values())
    record = result.blocks[0]
    assert BlockRecord.read(json.loads(json.dumps(asdict(record)))) == record
    planish.compress(how, folder, tmp_path / "disk", dtype=torch.float32, offload_dir=tmp_path / "streams")
    assert tree(tmp_path / "out") == tree(tmp_path / "disk")


def test_the_held_out_moments_are_counted(tmp_path: Path) -> None:
    """One matrix more for the Hessian, and one for the cross moment where there is one."""
    folder = source("llama", tmp_path / "model", changes={"intermediate_size": 512})
    for name, matrices in (("gptq", 1), ("gptaq", 2)):
        plain = replace(quick("w4a16-channel"), solver={"gptq": planish.Gptq(), "gptaq": planish.Gptaq()}[name])
        several = replace(plain, solver=replace(plain.solver, damping=(0.01, 0.1)))
        plans = [make_plan(recipe, folder, device="cpu", dtype=torch.bfloat16).memory.solver for recipe in (plain, several)]
        assert plans[1] - plans[0] == 4 * matrices * 512**2
