"""Bad input at the command line: one clear message, exit code 2, nothing written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, merge, rewrite
from helpers_front import SHORT, Ran, invoke, tree

from planish.quant.errors import PlanishError

Planish = Callable[..., Ran]


def refused(ran: Ran, *words: str) -> None:
    """One line on standard error that has these words."""
    assert ran.code == 2, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line, (word, line)


def refuses(model: Path, *words: str, recipe: str | Path = "w8a8", options: tuple[str | Path, ...] = SHORT) -> None:
    """compress refuses, and all is as it was."""
    folder = model.parent
    before = tree(folder)
    refused(invoke("compress", recipe, "--model", model, "--out", folder / "new" / "out", *options), *words)
    assert tree(folder) == before


# The model


def test_no_such_model(model: Path) -> None:
    refuses(model.with_name("nowhere"), "nowhere: no such folder", "demo:smollm2")


def test_config_missing(model: Path) -> None:
    (model / "config.json").unlink()
    refuses(model, "config.json")


def test_config_not_json(model: Path) -> None:
    (model / "config.json").write_text("{nothing")
    refuses(model, "config.json", "JSON")


@pytest.mark.parametrize("kind", ["sorcery", "bert", "mamba"])
def test_unknown_architecture(model: Path, kind: str) -> None:
    edit_json(model / "config.json", model_type=kind, architectures=["SorceryForCausalLM"])
    refuses(model, "config.json")


def test_architecture_without_a_topology(model: Path) -> None:
    edit_json(model / "config.json", model_type="cohere", architectures=["CohereForCausalLM"])
    refuses(model, "Cohere")


def test_shard_missing(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(model, shard.name)


def test_shard_truncated(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refuses(model, shard.name)


def test_shard_with_a_wrong_header(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    refuses(model, shard.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: Path, value: float) -> None:
    tensors = merge(model)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    rewrite(model, tensors)
    refuses(model, "model.layers.1.mlp.up_proj.weight", "NaN", options=(*SHORT, "--quiet"))


def test_pickle_weights(model: Path) -> None:
    torch.save(merge(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refuses(model, "pytorch_model.bin", "--allow-pickle")
    assert invoke("compress", "w8a8", "--model", model, "--out", model.parent / "out", *SHORT, "--allow-pickle", "--quiet").code == 0


def test_quantized_model(model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refuses(model, "already quantized")


def test_tokenizer_missing(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refuses(model, "no tokenizer")
    recipe = model.parent / "plain.yaml"
    recipe.write_text("name: plain\ncalibration: null\nscheme: {weights: {bits: 8}}\nsolver: rtn\n")
    refuses(model, "no tokenizer", recipe=recipe, options=())
    assert invoke("compress", recipe, "--model", model, "--out", model.parent / "out", "--no-evaluate", "--quiet").code == 0


# The recipe

RECIPES = {
    "unknown key": ("calibration: {smaples: 8}\n", ("calibration.smaples", "samples")),
    "wrong type": ("calibration: {samples: many}\n", ("calibration.samples", "many")),
    "negative": ("calibration: {samples: -1}\n", ("calibration.samples", "-1")),
    "not YAML": ("calibration: {samples\n", ("line",)),
    "static per token": ("scheme: {weights: {bits: 4}, activations: {bits: 4, granularity: token, dynamic: false}}\n", ("dynamic",)),
    "group": ("scheme: {weights: {bits: 4, granularity: group, group_size: 48}}\n", ("48", "64")),
    "pattern": ("overrides: [{sites: ['*.sideways'], keep: true}]\n", ("*.sideways", "gate_up")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(name: str, model: Path) -> None:
    text, words = RECIPES[name]
    scheme = "" if "scheme" in text else "scheme: {weights: {bits: 8}}\n"
    path = model.parent / "mine.yaml"
    path.write_text(f"name: mine\n{scheme}solver: rtn\n{text}")
    refuses(model, "mine", *words, recipe=path, options=())


def test_no_such_recipe(model: Path) -> None:
    refuses(model, "w8a9", "w8a8", recipe="w8a9")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("calibration.smaples=4", ("smaples", "samples")),
        ("calibration.samples=x", ("calibration.samples", "x")),
        ("calibration", ("path=value",)),
        ("scheme.weights.bits=9", ("bits", "9")),
        ("solver.gptq.damping=-1", ("damping", "-1")),
    ],
)
def test_bad_setting(setting: str, words: tuple[str, ...], model: Path) -> None:
    refuses(model, *words, options=("--set", setting))


# Text, disk, output, device


def test_text_missing_empty_or_short(model: Path) -> None:
    text = model.parent / "text.txt"
    for content, word in ((None, "text.txt"), ("", "no text"), ("A few words.", "length")):
        if content is not None:
            text.write_text(content)
        refuses(model, str(text), word, options=("--set", f"calibration.source={text}"))


def test_more_text_than_there_is(model: Path) -> None:
    refuses(model, "builtin holds", "calibration.samples", options=("--set", "calibration.samples=1000000"))


def test_disk_full_beforehand(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    refuses(model, "1.0 kB free")


@pytest.mark.parametrize("what", ["folder", "file", "report"])
def test_output_exists(what: str, model: Path) -> None:
    folder = model.parent / "new"
    folder.mkdir()
    if what == "folder":
        (folder / "out").mkdir()
    else:
        (folder / ("out" if what == "file" else "out.report.json")).write_text("mine")
    refuses(model, "exists, and planish overwrites nothing")


def test_output_under_a_file(model: Path) -> None:
    (model.parent / "new").write_text("mine")
    refuses(model, "is a file")


def test_device_that_is_not_there(model: Path) -> None:
    for device in ("gpu", "mps:7", "xpu"):
        refuses(model, device, "Here: cpu", options=("--device", device))


def test_offload_folder_is_a_file(model: Path) -> None:
    (model.parent / "file").write_text("mine")
    refuses(model, "is a file", options=("--offload-dir", model.parent / "file"))


# The command line itself


@pytest.mark.parametrize("arguments", [("compress",), ("compress", "w8a8"), ("squash",), ("plan", "w8a8", "--modle", "x"), ("recipes", "hide")])
def test_usage(arguments: tuple[str, ...], planish: Planish, tmp_path: Path) -> None:
    ran = planish(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage" in ran.err
    assert not tree(tmp_path)


def test_unknown_recipe_to_show(planish: Planish) -> None:
    refused(planish("recipes", "show", "w8a9"), "w8a8")


def test_plan_refuses_too(planish: Planish, model: Path) -> None:
    refused(planish("plan", "w8a8", "--model", model.with_name("nowhere")), "nowhere")


def test_verify_refuses(planish: Planish, model: Path) -> None:
    refused(planish("verify", model.with_name("nowhere"), "--quiet"), "nowhere")
    refused(planish("verify", model, "--quiet"), "config.json")


@pytest.mark.parametrize("arguments", [("--traceback", "plan", "w8a9", "--model", "x"), ("plan", "w8a9", "--model", "x", "--traceback")])
def test_traceback(arguments: tuple[str, ...], planish: Planish) -> None:
    ran = planish(*arguments)
    assert ran.code == 2
    assert "Traceback (most recent call last)" in ran.err
    assert PlanishError.__name__ in ran.err
    assert ran.err.splitlines()[-1].startswith("Error: recipe w8a9")


@pytest.mark.parametrize("kind", ["system", "safetensors"])
def test_disk_full_on_the_way(kind: str, planish: Planish, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    error = OSError(28, "No space left on device") if kind == "system" else SafetensorError("I/O error: No space left on device (os error 28)")

    def full(*_args: object) -> None:
        raise error

    arguments = ("compress", "w8a8", "--model", model, "--out", "out", *SHORT, "--quiet", "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr("planish.journal.save_file", full)
        refused(planish(*arguments), "he disk is full", "goes on at the block where it was")
    assert not (model.parent / "out").exists()
    assert json.loads((model.parent / "out.partial" / "journal.json").read_text())["blocks"] == []
    assert planish(*arguments).code == 0
