"""auto and raise_activations through the whole compression: what is chosen and said, what is refused, and that a resumed run ends the same."""

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import outlying, quick, source
from helpers_front import tree
from rich.console import Console

import planish
from planish.common.schemas import to_json
from planish.compressing.compression import Result
from planish.compressing.reporting import plan_report, run_report
from planish.compressing.tables import result_table
from planish.planning.preflight import make_plan
from planish.quant.errors import PlanishError
from planish.recipe.schema import Recipe, load_recipe, to_yaml, with_settings

CHOICE = "[auto: {candidates: [[hadamard: {block: 2}], [hadamard]], margin: 0.05}, clip]"
RAISE = "[hadamard, raise_activations: {share: 0.25}, clip]"


def chosen(steps: str, *settings: str) -> Recipe:
    return quick("w4a4-best", f"steps={steps}", *settings)


def sites(result: Result) -> dict[str, Any]:
    return {f"{block.index}.{name}": site for block in result.blocks for name, site in block.sites.items()}


def test_every_site_says_what_it_chose_and_why(tmp_path: Path) -> None:
    result = planish.compress(chosen(CHOICE), outlying(tmp_path / "model"), tmp_path / "out", dtype=torch.float32)
    for site in sites(result).values():
        assert list(site.candidates) == ["none", "hadamard {block: 2}", "hadamard"]
        least = min(site.candidates.values())
        near = [name for name, error in site.candidates.items() if error <= 1.05 * least]
        assert site.chosen == near[0]  # they are listed from the cheapest to the dearest
        assert [factor["kind"] for factor in site.chain] == ([] if site.chosen == "none" else ["hadamard"])
    assert len({site.chosen for site in sites(result).values()}) > 1
    report = json.loads(to_json(run_report(result, "model", (1, None), None)))
    manifest = json.loads((tmp_path / "out" / "planish" / "manifest.json").read_text())
    for blocks in (report["blocks"], manifest["blocks"]):
        assert {f"{block['index']}.{name}": site["candidates"] for block in blocks for name, site in block["sites"].items()} == {
            address: dict(site.candidates) for address, site in sites(result).items()
        }
    lines = printed(result)
    assert all(f"auto at {name.split('.')[1]}" in lines for name in sites(result))


def printed(result: Result) -> str:
    console = Console(width=200, file=StringIO())
    console.print(*result_table(result, None, run_report(result, "model", (1, None), None), [Path("report")]))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_choice_of_one_is_the_step_itself(tmp_path: Path) -> None:
    """Where it is better than nothing: the chain is fitted to all tokens then, so the bytes are those of the plain step."""
    model = outlying(tmp_path / "model")
    outs = [
        planish.compress(chosen(steps, "solver=rtn"), model, tmp_path / str(i), dtype=torch.float32)
        for i, steps in enumerate(("[auto: {candidates: [[hadamard]], margin: 0, sites: '0.down'}]", "[hadamard: {sites: '0.down'}]"))
    ]
    assert sites(outs[0])["0.down"].chosen == "hadamard"
    assert sites(outs[0])["0.qkv"].chosen is None
    assert sites(outs[0])["0.down"].error == sites(outs[1])["0.down"].error
    weights = [tree(out.out)["model.safetensors"] for out in outs]
    assert weights[0] == weights[1]


def test_weight_only_schemes_choose_too(tmp_path: Path) -> None:
    result = planish.compress(chosen("[auto]", "scheme.activations=null"), source("llama", tmp_path / "model"), tmp_path / "out")
    assert all(math.isfinite(error) for site in sites(result).values() for error in site.candidates.values())


def test_the_neediest_sites_are_raised_and_said(tmp_path: Path) -> None:
    model = outlying(tmp_path / "model")
    result = planish.compress(chosen(RAISE), model, tmp_path / "out", dtype=torch.float32)
    found = sites(result)
    gains = {address: site.activation_errors["int4"] ** 2 - site.activation_errors["int8"] ** 2 for address, site in found.items()}
    count = len(found) // 4
    assert {address for address, site in found.items() if site.raised} == set(sorted(gains, key=lambda address: -gains[address])[:count])
    assert all("activations raised to 8 bits" in site.note for site in found.values() if site.raised)
    bits = {f"{block}.{name}": how.scheme.activations.bits for (block, name), how in result.plan.packed.items() if how and how.scheme.activations}
    assert bits == {address: 8 if site.raised else 4 for address, site in found.items()}
    assert sum(len(how.blocks) for by in plan_report(result.plan).sites.values() for how in by if "int8" in (how.activations or "")) == count
    assert "raised activations" in printed(result)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["input_activations"]["num_bits"] for group in stored.values()) == [4, 8]
    plain = planish.compress(chosen("[hadamard, clip]"), model, tmp_path / "plain", dtype=torch.float32)
    assert sum(block.error or 0 for block in result.blocks) < sum(block.error or 0 for block in plain.blocks)


def test_portable_formats_take_raised_sites(tmp_path: Path) -> None:
    """Without a transform at run time other consumers run the checkpoint still."""
    recipe = chosen("[smooth, raise_activations: {share: 0.3, sites: '*.down'}]", "scheme.weights.symmetric=true")
    result = planish.compress(recipe, outlying(tmp_path / "model"), tmp_path / "out", dtype=torch.float32)
    raised = [address for address, site in sites(result).items() if site.raised]
    assert raised
    assert all(address.endswith(".down") for address in raised)
    assert "transformers" in result.plan.servers
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(group["input_activations"]["num_bits"] for group in stored["config_groups"].values()) == [4, 8]


class Stop(Exception):
    """As a kill would."""


class Stopping(planish.walk.callbacks.Silent):
    """Ends the run when the first block is done."""

    blocks = False

    def stage(self, name: str, steps: int) -> None:
        self.blocks = name == "blocks"

    def step(self, done: int, note: str = "") -> None:
        if self.blocks:
            raise Stop


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    recipe = chosen("[prefix: {tokens: [5]}, auto: {candidates: [[hadamard]]}, raise_activations: {share: 0.25}]", "solver=rtn")
    model, where = outlying(tmp_path / "model"), {"offload_dir": tmp_path / "streams"}
    whole = planish.compress(recipe, model, tmp_path / "whole", **where)
    with pytest.raises(Stop):
        planish.compress(recipe, model, tmp_path / "cut", progress=Stopping(), **where)
    cut = planish.compress(recipe, model, tmp_path / "cut", **where)
    assert cut.blocks == whole.blocks
    assert tree(cut.out)["model.safetensors"] == tree(whole.out)["model.safetensors"]
    assert not tree(tmp_path / "streams")


def test_yaml_round_trips(tmp_path: Path) -> None:
    recipe = chosen("[auto: {candidates: [[], [hadamard], [cat: {block: 96}], [shift, cat: {block: 96}]], held_out: 0.5}, raise_activations]")
    for defaults in (False, True):
        path = tmp_path / f"{defaults}.yaml"
        path.write_text(to_yaml(recipe, defaults=defaults), encoding="utf-8")
        assert load_recipe(path) == recipe
    assert with_settings(recipe, ["steps.auto.margin=0.1"]).steps[0] != recipe.steps[0]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[auto: {candidates: [[hadamrd]]}]", "steps.0.auto.candidates.0.0: unknown name 'hadamrd'. Did you mean hadamard?"),
        ("[auto: {candidates: [hadamard]}]", "steps.0.auto.candidates.0: expected a list, got 'hadamard'."),
        ("[shift, auto: {candidates: [[shift, cat: {blok: 3}]]}]", "steps.1.auto.candidates.0.1.cat.blok: unknown key. Did you mean block?"),
        ("[auto: {candidates: [[cat: {block: 0}]]}]", "steps.0.auto.candidates.0.0.cat.block is 0, but a block has at least 1 channel."),
        ("[auto: {candidates: [[hadamard: {sites: '0.*'}]]}]", "steps.0.auto.candidates.0.0: sites is for the whole step."),
        ("[auto: {candidates: [[auto]]}]", "steps.0.auto.candidates.0.0: unknown name 'auto'. Known: cat, duquant, hadamard, shift, wush."),
        ("[auto: {candidates: [[prefix]]}]", "steps.0.auto.candidates.0.0: unknown name 'prefix'."),
        ("[auto: {candidates: [[]]}]", "steps.0.auto.candidates has nothing to choose from."),
        ("[auto: {margn: 1}]", "steps.0.auto.margn: unknown key. Did you mean margin?"),
        ("[raise_activations: {share: 0}]", "steps.0.raise_activations.share is 0.0"),
        ("[raise_activations, raise_activations]", "steps: raise_activations is given twice."),
    ],
)
def test_refused_with_its_place(steps: str, message: str) -> None:
    with pytest.raises(PlanishError) as caught:
        chosen(steps)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "settings", "message"),
    [
        ("[auto, auto: {sites: '1.down'}]", (), "auto is given more than once at site 1.down"),
        ("[quad: {rank: 4}, auto]", (), "another transform follows quad or resq"),
        ("[auto: {sites: '9.*'}]", (), "steps.0.sites: '9.*' matches no site"),
        ("[raise_activations: {share: 0.01}]", (), "share is 0.01, less than one of 12 sites. Give at least 0.0833"),
        ("[raise_activations]", ("scheme.activations.bits=8",), "raise_activations matches no site whose activations have fewer than 8 bits"),
        ("[raise_activations]", ("scheme.activations=null",), "raise_activations measures what dynamic integers lose"),
        ("[raise_activations]", ("calibration=null", "solver=rtn"), "the step raise_activations cannot do without"),
    ],
)
def test_refused_for_a_model(steps: str, settings: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanishError) as caught:
        make_plan(chosen(steps, *settings), source("llama", tmp_path / "model"))
    assert message in str(caught.value)


def test_the_plan_says_what_may_be_raised(tmp_path: Path) -> None:
    plan = make_plan(chosen(RAISE), source("llama", tmp_path / "model"))
    assert "raise_activations: up to 3 of 12 sites get 8-bit activations; which, is measured first." in plan.notes
