"""planish.search: the budget is kept, the recipe compresses to what was promised, costs are those of the whole model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_compress import outlying, quick, source
from helpers_front import Ran

import planish
from planish.calib.compressed.packing import Packed, pack, stored_size
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.scores.score import compare
from planish.quant.errors import PlanishError
from planish.quant.formats import Scheme, WeightFormat
from planish.quant.solvers import Clip, Gptq, Rtn
from planish.recipe.schema import load_recipe, to_yaml, with_settings
from planish.searching.candidates import at_site, candidate, names_for
from planish.searching.measuring import CLIP_GRID, quicker
from planish.searching.search import patterns, split

NAMES = ("3", "4", "8", "4-g32", "keep")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outlying(tmp_path_factory.mktemp("search") / "base")


@pytest.fixture(scope="module")
def found(base: Path) -> planish.SearchResult:
    return planish.search(quick("w4a16-channel"), base, "5bpw", candidates=NAMES, target="planish", tokens=64)


def test_the_budget_is_kept_and_the_choice_beats_single_formats(found: planish.SearchResult) -> None:
    assert 4.5 < found.bits_per_weight <= 5
    assert all(cost > found.cost for bits, cost in found.uniform.values() if bits <= 5)
    assert len(set(found.chosen)) > 1
    assert found.cost == pytest.approx(sum(site.options[name].cost for site, name in zip(found.sites, found.chosen, strict=True)))


def test_the_recipe_makes_what_was_promised(found: planish.SearchResult, base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(to_yaml(found.recipe))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe == found.recipe
    result = planish.compress(recipe, base, tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(found.bits_per_weight, abs=1e-9)
    assert sum(info.nbytes for info in open_stored(tmp_path / "out").tensors.values()) == found.bytes
    packed = open_stored(tmp_path / "out").packed
    for site, name in zip(found.sites, found.chosen, strict=True):
        readers = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "gate_up": ("mlp.gate_proj", "mlp.up_proj")}
        for path in readers.get(site.site, ()):
            assert packed[f"model.layers.{site.block}.{path}"].scheme.weights == candidate(name)


def test_a_measured_cost_is_that_of_a_model_with_that_site_alone_quantized(base: Path, tmp_path: Path) -> None:
    recipe = with_settings(quick("w4a16-channel"), ["solver=rtn", "calibration.samples=3"])
    result = planish.search(recipe, base, "5bpw", candidates=("4", "8"), every=True, tokens=64)
    alone = with_settings(recipe, ["overrides=[{sites: ['0.*', '2.*', '1.qkv', '1.o', '1.gate_up'], keep: true}]"])
    planish.compress(alone, base, tmp_path / "out")
    assert recipe.calibration is not None
    _, ids_NL = split(recipe.calibration.tokens(open_checkpoint(base).tokenizer()), 64)
    expected = compare(open_checkpoint(base), open_stored(tmp_path / "out"), ids_NL).kl
    (site,) = (site for site in result.sites if (site.block, site.site) == (1, "down"))
    assert site.options["4"].cost == pytest.approx(expected, rel=1e-3)
    assert all(option.measured for each in result.sites for option in each.options.values())


def test_one_probe_a_site_says_nearly_what_all_do(tmp_path: Path) -> None:
    base = source("llama", tmp_path / "base")  # no outliers: divergences so small that they are quadratic
    one, every = (planish.search(quick("w4a16-channel"), base, "6bpw", candidates=("4", "8"), every=each, tokens=64) for each in (False, True))
    assert [sum(option.measured for option in site.options.values()) for site in one.sites] == [1] * 12
    for ours, theirs in zip(one.sites, every.sites, strict=True):
        assert ours.options["4"] == theirs.options["4"]
        assert 0.2 < ours.options["8"].cost / theirs.options["8"].cost < 5


def test_a_size_is_a_budget_too(base: Path) -> None:
    whole = open_checkpoint(base).nbytes
    result = planish.search(quick("w4a16-channel"), base, f"{whole // 1000 - 60}kB", candidates=("4", "8"), tokens=64)
    assert whole - 160_000 < result.bytes <= (whole // 1000 - 60) * 1000
    assert {"4", "8"} >= set(result.chosen)


def test_a_speed_is_a_budget_too(base: Path) -> None:
    slow, fast = (planish.search(quick("w4a16-channel"), base, budget, candidates=("4", "8"), tokens=64) for budget in ("1.9x", "2.2x"))
    assert 1.9 <= slow.speedup < 2.2 <= fast.speedup
    assert fast.bytes < slow.bytes
    assert fast.cost > slow.cost


def test_a_budget_too_small_says_what_is_possible(base: Path) -> None:
    with pytest.raises(PlanishError, match=r"budget 2bpw: the smallest candidates take 4\.27 bits per weight.*at least 4\.27bpw or 0\.2MB"):
        planish.search(quick("w4a16-channel"), base, "2bpw")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "4.5"}, "Write bits per weight, such as 4.5bpw"),
        ({"target": "sglang"}, "target 'sglang' is none of vllm, transformers, planish"),
        ({"candidates": ["4"]}, "nothing to choose from"),
        ({"candidates": ["4", "int8"]}, "candidate 'int8' is none"),
        ({"candidates": ["3", "5"]}, "vllm runs none of the candidates 3, 5 there"),
        ({"recipe": "w4a4-best"}, "Give --target planish"),
        ({"recipe": "w4a4-nvfp4"}, "its weights are floats"),
        ({"recipe": "w8a8-fp8"}, "its weights are floats, and a search chooses among integers"),
    ],
)
def test_what_is_refused(base: Path, settings: dict[str, str], message: str) -> None:
    asked = {"recipe": "w4a16-channel", "budget": "5bpw", **settings}
    recipe = quick(asked.pop("recipe"))
    with pytest.raises(PlanishError, match=message):
        planish.search(recipe, base, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["16bpw", "20bpw", "1GB", "0.9x"])
def test_a_budget_for_the_whole_model_is_refused(base: Path, budget: str) -> None:
    words = rf"budget {budget}: the model has room in it as it is, with 16 bits per weight.*leave keep out of the candidates"
    with pytest.raises(PlanishError, match=words):
        planish.search(quick("w4a16-channel"), base, budget, candidates=("4", "keep"))
    found = planish.search(quick("w4a16-channel"), base, budget, candidates=("4", "8"), tokens=64)
    assert set(found.chosen) == {"8"}


def test_a_recipe_with_transforms(base: Path, tmp_path: Path) -> None:
    recipe = with_settings(quick("w4a4-fast"), ["steps=[fold_norms, {rotate: {at: residual}}, {hadamard: {sites: ['*.down']}}]"])
    result = planish.search(recipe, base, "4.6bpw", candidates=("3", "4", "6"), target="planish", tokens=64)
    assert result.recipe.steps == recipe.steps
    assert planish.compress(result.recipe, base, tmp_path / "out").bits_per_weight <= 4.6


def test_sites_the_recipe_keeps_stay_kept(base: Path) -> None:
    recipe = with_settings(quick("w4a16-channel"), ["overrides=[{sites: ['0.*'], keep: true}]"])
    result = planish.search(recipe, base, "5bpw", candidates=("4", "8"), tokens=64)
    assert {site.block for site in result.sites} == {1, 2}
    assert result.recipe.overrides[0].keep


def test_other_families(tmp_path: Path) -> None:
    for family in ("gpt2", "phi3"):
        model = source(family, tmp_path / family)
        result = planish.search(quick("w4a16-channel"), model, "6bpw", candidates=("4", "8"), target="planish", tokens=64)
        assert result.bits_per_weight <= 6


def test_candidates() -> None:
    assert candidate("4-g32-asym") == WeightFormat(bits=4, symmetric=False, granularity="group", group_size=32)
    assert candidate("keep") is None
    assert names_for("vllm", ["4", "8", "4"]) == ("4", "8")
    recipe = load_recipe("w8a8")
    how = Packed(recipe.scheme, "int-quantized")
    assert list(at_site(names_for("vllm", None), how, 96, "vllm", recipe, "llama")) == ["8", "keep"]  # W4A8 of vLLM has each token's own range
    asymmetric = load_recipe("w4a8")
    how = Packed(asymmetric.scheme, "int-quantized")
    assert list(at_site(names_for("vllm", None), how, 96, "vllm", asymmetric, "llama")) == ["4", "8", "keep"]
    weight_only = load_recipe("w4a16-channel")
    how = Packed(weight_only.scheme, "pack-quantized")
    assert list(at_site(names_for("vllm", None), how, 96, "vllm", weight_only, "llama")) == ["4", "4-asym", "4-g32", "8", "keep"]
    assert list(at_site(["4-g32-asym", "4-g32", "5"], how, 96, "transformers", weight_only, "llama")) == ["4-g32", "5"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [None, 8])
def test_sizes_are_those_of_what_is_stored(bits: int, symmetric: bool, group: int | None) -> None:
    fmt = WeightFormat(bits=bits, symmetric=symmetric, granularity="channel" if group is None else "group", group_size=group)
    weight = Rtn().solve(torch.randn(10, 24), fmt, None, torch.bfloat16).weight
    for layout in ("pack-quantized", "int-quantized"):
        tensors = pack(weight, layout, torch.bfloat16, None)  # type: ignore[arg-type]
        assert stored_size(Packed(Scheme(weights=fmt), layout), 10, 24, 2) == sum(t.nbytes for t in tensors.values())  # type: ignore[arg-type]


def test_divergence_is_measured_on_other_text_than_solvers_see() -> None:
    ids_NL = torch.arange(60).view(6, 10)
    for tokens, held in ((5, 1), (10, 1), (25, 2), (1000, 5)):
        fit_NL, held_NL = split(ids_NL, tokens)
        assert len(held_NL) == held
        assert held_NL.numel() == min(held * 10, max(tokens, 5))
        assert not set(fit_NL.flatten().tolist()) & set(held_NL.flatten().tolist())
    assert [part.numel() for part in split(ids_NL[:1], 8)] == [10, 8]


def test_small_parts() -> None:
    assert patterns([(0, "o"), (1, "o"), (1, "down")], {"o": 2, "down": 2}) == ("*.o", "1.down")
    solver = load_recipe("w4a16-channel").solver
    assert quicker(solver).clip == Clip(grid=CLIP_GRID)
    assert quicker(Gptq()) == Gptq()


def test_the_command_writes_a_recipe(base: Path, planish: Callable[..., Ran], tmp_path: Path) -> None:
    quick_text = ("--set", "calibration.samples=2", "--set", "calibration.length=32", "--tokens", "32")
    arguments = ("search", "w4a16-channel", "--model", base, "--budget", "5bpw", "--candidates", "4,8", "--out", "mine.yaml", *quick_text)
    ran = planish(*arguments)
    assert ran.code == 0
    assert "expected divergence" in ran.out
    assert load_recipe(tmp_path / "mine.yaml").name == "w4a16-channel-5bpw"
    ran = planish(*arguments, "--json", "-q")
    assert (ran.code, "exists" in ran.err) == (2, True)
    ran = planish(*arguments, "--json", "-q", "--force")
    assert json.loads(ran.out)["bits_per_weight"] <= 5
