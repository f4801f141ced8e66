"""Bad input at the command line: one clear message, exit code 2, nothing written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import edit_json, merge, rewrite
from helpers_compress import source
from helpers_front import SHORT, Ran, invoke, tree
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from planish.calib.blocks.families import FAMILIES
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
    out = model.parent / "out"
    assert invoke("compress", "w8a8", "--model", model, "--out", out, *SHORT, "--allow-pickle", "--quiet").code == 0
    for command in ("verify", "eval", "layers"):
        against = (command, out, "--against", model, "--length", "64", "--quiet")
        assert "--allow-pickle" in invoke(*against).err
        assert invoke(*against, "--allow-pickle").code == 0


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


# The family's table against the real weights

LLAMA = FAMILIES["llama"]
WRONG_TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "norm of another site": ({"qkv_norm": LLAMA.up_norm}, ("site qkv: a scale moved from", "to post_attention_layernorm changes", "of its size")),
    "rows of another layer": ({"v": "self_attn.k_proj"}, ("site o: a scale moved from self_attn.o_proj to self_attn.k_proj",)),
    "another order": (
        {
            **{"qkv": LLAMA.up, "qkv_norm": LLAMA.up_norm, "o": LLAMA.down, "v": LLAMA.up_host, "v_rows": LLAMA.up_rows},
            **{"up": LLAMA.qkv, "up_norm": LLAMA.qkv_norm, "down": LLAMA.o, "up_host": LLAMA.v, "up_rows": LLAMA.v_rows},
        },
        ("site qkv: self_attn.q_proj ran when mlp.gate_proj, mlp.up_proj was due",),
    ),
    "a reader missing": ({"qkv": ("self_attn.q_proj", "self_attn.v_proj")}, ("no site reads self_attn.k_proj.weight",)),
    "a reader that is not there": ({"o": "self_attn.out_proj"}, ("site o: reader self_attn.out_proj is missing",)),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_wrong_family_table(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, words = WRONG_TABLES[name]
    monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA, **changes))
    refuses(model, "llama, model.layers.0", "Correct the family's table", *words)
    refused(invoke("plan", "w8a8", "--model", model, *SHORT), *words)


def test_table_that_only_the_last_block_contradicts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gate and up are exchanged in the code that runs, as in a model whose last block is of another kind."""
    run, last = LlamaMLP.forward, []

    def other(self: LlamaMLP, x: Tensor) -> Tensor:
        if not any(self is mlp for mlp in last):
            return run(self, x)
        out: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return out

    start = LlamaDecoderLayer.__init__

    def marked(self: LlamaDecoderLayer, config: LlamaConfig, layer_idx: int) -> None:
        start(self, config, layer_idx)
        if layer_idx == config.num_hidden_layers - 1:
            last.append(self.mlp)

    monkeypatch.setattr(LlamaMLP, "forward", other)
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", marked)
    refuses(model, "llama, model.layers.2, site down: a scale moved from mlp.down_proj to mlp.up_proj")


def test_walk_in_another_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the proof not there, the walk itself would say so, and leave nothing."""
    monkeypatch.setattr("planish.planning.preflight._prove", lambda _runner: None)
    monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA, **WRONG_TABLES["another order"][0]))
    refuses(model, "the block came to site gate_up while qkv was next", recipe="w4a16-channel", options=(*SHORT, "--quiet"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_where_the_proof_is(model: Path, name: str, value: float) -> None:
    tensors = merge(model)
    tensors[name][0, 1] = value
    rewrite(model, tensors)
    refuses(model, name, "NaN", "infinite values")


def test_model_without_blocks(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=0)
    refuses(model, "num_hidden_layers is 0")


def test_more_positions_than_there_are(tmp_path: Path) -> None:
    folder = source("gpt2", tmp_path / "model")
    refuses(folder, "calibration.length is 129", "128 positions", options=("--set", "calibration.length=129", "--set", "calibration.samples=2"))


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = source("llama", tmp_path / "model", changes={"vocab_size": 120})
    refuses(folder, "the tokenizer makes token", "the model has 120 tokens")


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


@pytest.mark.parametrize("what", ["folder", "file"])
def test_working_folder_is_somebody_elses(what: str, model: Path) -> None:
    """It would be emptied at the end."""
    partial = model.parent / "new" / "out.partial"
    partial.parent.mkdir()
    if what == "folder":
        partial.mkdir()
        (partial / "thesis.txt").write_text("mine")
    else:
        partial.write_text("mine")
    refuses(model, "out.partial", options=(*SHORT, "--quiet", "--no-evaluate"))


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


@pytest.mark.parametrize("kind", ["CPU", "GPU"])
def test_memory_runs_out_on_the_way(kind: str, planish: Planish, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB. Process 7 has all of it.")

    def wanting(*_args: object) -> None:
        if kind == "GPU":
            raise gpu
        torch.empty(1 << 50)

    arguments = ("compress", "w8a8", "--model", model, "--out", "out", *SHORT, "--quiet", "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr("planish.common.files.save_file", wanting)
        refused(
            planish(*arguments),
            "you tried to allocate" if kind == "CPU" else "CUDA out of memory. Tried to allocate 2.00 GiB. Take less",
            "--offload-dir",
        )
    assert not (model.parent / "out").exists()
    assert planish(*arguments).code == 0


@pytest.mark.parametrize("kind", ["system", "safetensors"])
def test_disk_full_on_the_way(kind: str, planish: Planish, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    error = OSError(28, "No space left on device") if kind == "system" else SafetensorError("I/O error: No space left on device (os error 28)")

    def full(*_args: object) -> None:
        raise error

    arguments = ("compress", "w8a8", "--model", model, "--out", "out", *SHORT, "--quiet", "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr("planish.common.files.save_file", full)
        refused(planish(*arguments), "he disk is full", "goes on at the block where it was")
    assert not (model.parent / "out").exists()
    assert json.loads((model.parent / "out.partial" / "journal.json").read_text())["blocks"] == []
    assert planish(*arguments).code == 0
