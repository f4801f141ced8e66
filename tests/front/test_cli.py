"""The command line when all is well."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import merge, rewrite
from helpers_front import SHORT, Ran, start, tree

from planish.recipe.shipped import shipped, shipped_text

Planish = Callable[..., Ran]


@pytest.fixture(scope="module", params=sorted(shipped()))
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


NARROW = {  # what does not fit a model of 64 channels
    "paper-quad": ("steps.quad.rank=8",),
    "paper-svdquant": ("scheme.weights.group_size=32", "scheme.activations.group_size=32", "steps.svdquant.rank=8"),
}


def test_compress_verify_and_load(recipe: str, planish: Planish, original: Path, tmp_path: Path) -> None:
    settings = [part for setting in NARROW.get(recipe, ()) for part in ("--set", setting)]
    ran = planish("compress", recipe, "--model", original, "--out", "new", *SHORT, *settings)
    assert ran.code == 0, ran
    for words in ("size", "bits per quantized weight", "perplexity", "KL divergence", "peak memory", "new.report.json"):
        assert words in ran.out
    assert "blocks 3/3, error 0." in ran.err
    assert "runs in" in ran.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ran.out + ran.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.report.html", "new.report.json"]
    ran = planish("verify", "new", "--against", original, "--windows", "2", "--length", "64")
    assert ran.code == 0, ran
    assert "FAILED" not in ran.out


@pytest.mark.smoke
def test_report(planish: Planish, original: Path, tmp_path: Path) -> None:
    ran = planish("compress", "w8a8", "--model", original, "--out", "new", *SHORT, "--json")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert report == json.loads((tmp_path / "new.report.json").read_text())
    assert report["planish"] == version("planish")
    assert report["checkpoint"] == str(tmp_path / "new")
    assert report["bytes"]["after"] == sum(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors"))
    assert 8 <= report["bits_per_weight"] < 9
    evaluation = report["evaluation"]
    assert (evaluation["windows"], evaluation["length"]) == (4, 128)
    assert evaluation["quantized"]["perplexity"] == pytest.approx(evaluation["base"]["perplexity"], rel=0.05)
    assert 0 < evaluation["kl"] < 0.1
    assert [block["index"] for block in report["blocks"]] == [0, 1, 2]
    assert report["plan"]["sites"]["qkv"] == [
        {"blocks": [0, 1, 2], "weights": "int8 per channel", "activations": "int8 per token", "layout": "int-quantized"}
    ]


def test_two_runs_give_the_same_bytes(planish: Planish, original: Path, tmp_path: Path) -> None:
    for out, options in (("a", ()), ("b", ("--offload-dir", "streams"))):
        assert planish("compress", "w8a8", "--model", original, "--out", out, *SHORT, "--no-evaluate", "--quiet", *options).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert "planish/manifest.json" in tree(tmp_path / "a")
    assert not tree(tmp_path / "streams")


def test_quiet_and_unevaluated(planish: Planish, original: Path) -> None:
    ran = planish("compress", "w4a8", "--model", original, "--out", "new", *SHORT, "--quiet", "--no-evaluate", "--dtype", "bfloat16")
    assert (ran.code, ran.err) == (0, "")
    assert "perplexity" not in ran.out
    ran = planish("compress", "w4a8", "--model", original, "--out", "other", *SHORT, "--no-evaluate")
    assert (ran.code, "to evaluate the result" in ran.err) == (0, False)
    report = json.loads(Path("new.report.json").read_text())
    assert report["evaluation"] is None
    assert report["plan"]["arithmetic"] == {"dtype": "bfloat16", "device": "cpu"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--html", "same", "--markdown", "./same"), "--html and --markdown are both same"),
        (("--html", "new"), "--out and --html are both new"),
        (("--html", "new.partial"), "--html new.partial: lies where --out new is made"),
        (("--markdown", "new/model.md"), "--markdown new/model.md: lies where --out new is made"),
        (("--markdown", "new.report.json"), "the report and --markdown are both"),
        (("--markdown", "new.report.json.partial"), "lies where the report new.report.json is made"),
        (("--markdown", "./new.report.html"), "the page and --markdown are both"),
    ],
)
def test_two_things_of_one_name(options: tuple[str, ...], words: str, planish: Planish, original: Path, tmp_path: Path) -> None:
    ran = planish("compress", "w8a8", "--model", original, "--out", "new", *options)
    assert (ran.code, words in ran.err) == (2, True), ran
    assert not tree(tmp_path)


def test_plan(planish: Planish, original: Path, tmp_path: Path) -> None:
    ran = planish("plan", "w4a16-g128", "--model", original, *SHORT)
    assert (ran.code, ran.err) == (0, "")
    for words in ("llama, 3 blocks", "qkv, o, gate_up", "int4 per group of", "note", "memory", "disk", "time", "to evaluate the result", "vLLM"):
        assert words in ran.out
    ran = planish("plan", "w8a8", "--model", original, "--json", "--set", 'overrides=[{sites: ["1.*"], keep: true}]', "--offload-dir", tmp_path)
    plan = json.loads(ran.out)
    assert plan["offload"]
    assert [row["blocks"] for row in plan["sites"]["down"]] == [[0, 2], [1]]
    assert plan["sites"]["down"][1]["weights"] is None
    assert plan["seconds_evaluating"] > 0
    assert not [note for note in plan["notes"] if "left out" in note]
    assert not tree(tmp_path)


@pytest.mark.parametrize(("count", "words"), [(1, "holds 1 tensor that the model"), (5, "surplus.0, surplus.1, surplus.2 and 2 others.")])
def test_plan_says_what_is_left_out(count: int, words: str, planish: Planish, model: Path) -> None:
    rewrite(model, {**merge(model), **{f"surplus.{i}": torch.ones(2) for i in range(count)}})
    ran = planish("plan", "w8a8", "--model", model, *SHORT, "--json")
    (note,) = (note for note in json.loads(ran.out)["notes"] if "left out of the output" in note)
    assert words in note


def test_verify_fails_with_exit_code_1(planish: Planish, original: Path, tmp_path: Path) -> None:
    assert planish("compress", "w8a8", "--model", original, "--out", "new", *SHORT, "--no-evaluate").code == 0
    (shard,) = (tmp_path / "new").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-2000:] = bytes(2000)
    shard.write_bytes(content)
    ran = planish("verify", "new")
    assert ran.code == 1
    assert "FAILED" in ran.out
    ran = planish("verify", "new", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["ok"] is False


@pytest.mark.smoke
def test_recipes(planish: Planish) -> None:
    ran = planish("recipes")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == sorted(shipped())
    assert planish("recipes", "show", "w4a8").out == shipped_text("w4a8")


@pytest.mark.smoke
def test_version_and_help(planish: Planish) -> None:
    assert planish("--version") == Ran(0, f"planish {version('planish')}\n", "")
    ran = planish("--help")
    assert ran.code == 0
    for command in ("compress", "compare", "inspect", "plan", "verify", "recipes", "demo"):
        assert command in ran.out


def test_what_needs_no_torch_imports_none() -> None:
    code = (
        "import sys, planish, planish.cli; from planish.recipe import shipped; "
        "planish.PlanishError; shipped.shipped(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SLIPS = {  # what is wrong, and what is not yet imported when that is said
    "compress w8a9 --model demo:smollm2 --out out": "torch",
    "compress w8a8 --model demo:smolm2 --out out": "torch",
    "compress w8a8 --model demo:smollm2 --out out --set solver.gptw=1": "planish.compressing.job",
    "plan w8a8.yml --model demo:smollm2": "torch",
    "plan w8a8 --model none": "torch",
    "compare w8a8 w8a9 --model demo:smollm2": "torch",
    "compare w8a8 --model none": "torch",
    "compare w8a8 --model demo:smollm2 --text none.txt": "torch",
    "compare w8a8 --model demo:smollm2 --out file": "torch",
    "compare w8a8 --model demo:smollm2 --vary solver.gptw=1,2": "planish.comparing.job",
    "eval none": "torch",
    "eval demo:smollm2 --against file": "torch",
    "eval demo:smollm2 --text none.txt": "torch",
    "eval demo:smollm2 --out file": "torch",
    "eval demo:smollm2 --gate lk=0.1": "torch",
    "eval demo:smollm2 --gate w8a9": "torch",
    "eval demo:smollm2 --text none --tasks arc_easy --windows 3": "torch",
    "eval demo:smollm2 --text none --tasks arc_easy --bos none": "torch",
    "eval demo:smollm2 --batch-size 8": "torch",
    "eval demo:smollm2 --server-timeout 5": "torch",
    "eval demo:smollm2 --server http://127.0.0.1:1 --dtype float32": "torch",
    "search w8a9 --model demo:smollm2 --budget 4bpw --out new.yaml": "torch",
    "search w8a8 --model none --budget 4bpw --out new.yaml": "torch",
    "search w8a8 --model demo:smollm2 --budget 4bits --out new.yaml": "torch",
    "search w8a8 --model demo:smollm2 --budget 4bpw --out file": "torch",
    "search w8a8 --model demo:smollm2 --budget 4bpw --out new.yaml --set solver.gptw=1": "planish.searching.search",
    "inspect none": "torch",
    "layers none --against demo:smollm2": "torch",
    "layers none --against demo:smollm2 --sites 0 --evenly": "torch",
    "verify none": "torch",
    "verify none --server-env none": "torch",
    "verify none --no-transformers --length 5": "torch",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_is_refused_before_what_works_is_imported(line: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "import sys; from planish.cli import app; code = app(sys.argv[2:], standalone_mode=False); sys.exit(code + 10 * (sys.argv[1] in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code, SLIPS[line], *line.split()], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, ""), ran
    (message,) = ran.stderr.splitlines()
    assert message.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.demo
def test_demo(tmp_path: Path) -> None:
    process = start("demo", "--json", folder=tmp_path)  # alone, since the peak of memory is the process's
    out, err = process.communicate()
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["model"] == "demo:smollm2"
    assert report["bytes"]["after"] < 0.65 * report["bytes"]["before"]
    assert report["evaluation"]["quantized"]["perplexity"] < 1.02 * report["evaluation"]["base"]["perplexity"]
    assert report["peak_bytes"] < 1.2e9
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["demo-w8a8", "demo-w8a8.report.html", "demo-w8a8.report.json"]
