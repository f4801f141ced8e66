"""The written checkpoint: shards, index, alignment, side files, model card, manifest, tied embeddings, the same bytes every time."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import edit_json
from helpers_compress import VOCABULARY, distance, ids, quick, source
from helpers_front import tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import planish
from planish.calib.files.shards import INDEX_FILE, SINGLE_FILE, TensorInfo, read_header
from planish.compressing import compression
from planish.compressing.shardwriter import write_shards
from planish.quant.formats import Scheme, WeightFormat
from planish.recipe.schema import Recipe, digest, load_recipe

BYTES = planish.Export(layout="int-quantized")
RTN = Recipe(name="rtn", calibration=None, scheme=Scheme(weights=WeightFormat(bits=8)), solver=planish.Rtn(), export=BYTES)
PACKED = replace(RTN, export=planish.Export())
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE.txt"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
TEMPLATE = "additional_chat_templates/tool.jinja"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def originals(tmp_path: Path) -> dict[str, TensorInfo]:
    """Tensors of every width, one of them empty, in one file."""
    tensors = {
        "a.odd": torch.arange(7, dtype=torch.int8),
        "b.wide": torch.tensor([3, 5], dtype=torch.int64),
        "c.half": torch.randn(5, 3).bfloat16(),
        "d.empty": torch.zeros(0, 4),
        "e.float": torch.randn(11),
        "f.odd": torch.arange(3, dtype=torch.uint8),
        "g.scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    return read_header(tmp_path / "in.safetensors")


def test_one_file_when_small(originals: dict[str, TensorInfo], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(folder, originals, 10**6)
    assert [path.name for path in folder.iterdir()] == [SINGLE_FILE]
    check_files(folder, originals)
    with safe_open(folder / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 20, 45, 80])
def test_shards(limit: int, originals: dict[str, TensorInfo], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(folder, originals, limit)
    index = read(folder / INDEX_FILE)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert index["metadata"] == {"total_size": sum(info.nbytes for info in originals.values())}
    assert set(index["weight_map"]) == set(originals)
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] == sorted(set(index["weight_map"].values()))
    for file in files:
        header = read_header(folder / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(header)
        assert sum(info.nbytes for info in header.values()) <= limit or sum(info.nbytes > 0 for info in header.values()) == 1
    check_files(folder, originals)


def check_files(folder: Path, originals: dict[str, TensorInfo]) -> None:
    """Byte for byte the originals, each at a multiple of its item size."""
    found = {name: info for file in folder.glob("*.safetensors") for name, info in read_header(file).items()}
    assert set(found) == set(originals)
    for name, info in found.items():
        assert (info.dtype, info.shape) == (originals[name].dtype, originals[name].shape)
        assert info.offset % info.dtype.itemsize == 0
        assert info.file.read_bytes()[info.offset :][: info.nbytes] == originals[name].file.read_bytes()[originals[name].offset :][: info.nbytes]
    loaded = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(loaded) == set(originals)


def test_a_truncated_source_is_an_error(originals: dict[str, TensorInfo], tmp_path: Path) -> None:
    file = tmp_path / "in.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="ended inside tensor"):
        write_shards(tmp_path / "out", originals, 10**6)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    """More than a shard's worth; what is not quantized is what it was, byte for byte."""
    folder = source("llama", tmp_path / "model", torch.float32, {"hidden_size": 256, "intermediate_size": 512}, shard="1MB")
    recipe = replace(RTN, export=planish.Export(shard_size="1MB", layout="int-quantized"))
    result = planish.compress(recipe, folder, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert result.stored_bytes == sum(file.stat().st_size for file in files)
    before = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    after = {name: value for file in files for name, value in load_file(file).items()}
    untouched = [name for name in after if after[name].dtype is torch.float32 and not name.endswith("scale")]
    assert len(untouched) == 1 + 1 + 2 * 3
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert set(after) - set(before) == {f"{name.removesuffix('weight')}weight_scale" for name in after if after[name].dtype is torch.int8}
    assert set(read(tmp_path / "out" / "planish" / "manifest.json")["files"]) == {"config.json", INDEX_FILE, *(file.name for file in files)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt-350m", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_stay_as_they_are(family: str, tied: bool, tmp_path: Path) -> None:
    folder = source(family, tmp_path / "model", changes={"tie_word_embeddings": tied})
    planish.compress(PACKED if family == "gpt2" else RTN, folder, tmp_path / "out", dtype=torch.float32)
    names = set(read_header(tmp_path / "out" / SINGLE_FILE))
    heads = {"lm_head.weight", "embed_out.weight"} & names
    assert len(heads) == (0 if tied else 1)
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is tied
    model = planish.load(tmp_path / "out", dtype=torch.float32)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert distance(model(ids()).logits, planish.load(folder, dtype=torch.float32)(ids()).logits) < 0.05


@torch.no_grad()
def test_a_tie_that_the_weights_contradict(tmp_path: Path) -> None:
    """config.json says tied, the files hold two different matrices: both are kept, and the new config says so."""
    folder = source("llama", tmp_path / "model", changes={"tie_word_embeddings": False})
    edit_json(folder / "config.json", tie_word_embeddings=True)
    planish.compress(RTN, folder, tmp_path / "out", dtype=torch.float32)
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = tiny("llama", changes={"vocab_size": VOCABULARY, "tie_word_embeddings": False}).to(torch.bfloat16).float()
    assert torch.equal(stock.lm_head.weight, expected.lm_head.weight)
    assert distance(stock(ids()).logits, expected(ids()).logits) < 0.05


def test_a_copy_of_the_tied_matrix_is_dropped(tmp_path: Path) -> None:
    folder = source("llama", tmp_path / "model")
    tensors = load_file(folder / SINGLE_FILE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE_FILE, {"format": "pt"})
    planish.compress(RTN, folder, tmp_path / "out", dtype=torch.float32)
    assert "lm_head.weight" not in read_header(tmp_path / "out" / SINGLE_FILE)
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True


def test_side_files_card_and_manifest(tmp_path: Path) -> None:
    folder, out = source("llama", tmp_path / "model"), tmp_path / "out"
    GenerationConfig(max_new_tokens=3).save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("free\n")
    for name in SIDE_FILES[-3:]:
        (folder / name).write_text("{}")
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text("{{ messages }}")
    (folder / "notes.txt").write_text("not of the model")
    recipe = quick("w8a8")
    result = planish.compress(recipe, folder, out, dtype=torch.float32)
    for name in (*SIDE_FILES, TEMPLATE):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "notes.txt").exists()
    assert AutoTokenizer.from_pretrained(out).encode("if x") == AutoTokenizer.from_pretrained(folder).encode("if x")
    assert load_recipe(out / "planish" / "recipe.yaml") == recipe
    check_manifest(read(out / "planish" / "manifest.json"), recipe, result)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: model\n")
    for words in ("w8a8", f"{result.bits_per_weight:.2f}, scales and transforms included", "vllm serve", "samples: 4", "from_pretrained"):
        assert words in card
    assert "\n\n\n" not in card
    config, before = read(out / "config.json"), read(folder / "config.json")
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == before
    assert config["dtype"] == "bfloat16"
    assert not [path for path in out.rglob("*") if path.suffix in (".new", ".lock")]


def check_manifest(manifest: dict[str, Any], recipe: Recipe, result: planish.Result) -> None:
    assert manifest["recipe"] == {"name": "w8a8", "sha256": digest(recipe)}
    assert manifest["model"]["family"] == "llama"
    assert manifest["model"]["sha256"] == result.plan.checkpoint.fingerprint()
    assert set(manifest["versions"]) == {"planish", "torch", "transformers", "compressed-tensors", "safetensors"}
    assert manifest["calibration"]["seed"] == 0
    assert manifest["calibration"]["samples"] == 4
    assert manifest["arithmetic"] == {"dtype": "float32", "device": "cpu"}
    files = {name: hashlib.sha256((result.out / name).read_bytes()).hexdigest() for name in ("config.json", SINGLE_FILE)}
    assert manifest["files"] == files
    assert manifest["bytes"] < result.stored_bytes < manifest["bytes"] + 20_000
    assert [block["error"] for block in manifest["blocks"]] == [block.error for block in result.blocks]
    assert "vLLM" in manifest["servers"]


def test_the_card_names_only_what_runs_the_checkpoint(tmp_path: Path) -> None:
    planish.compress(PACKED, source("gpt2", tmp_path / "model"), tmp_path / "out", dtype=torch.float32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "planish.load" in card
    assert "|\n\n- " in card
    assert "\n\n\n" not in card
    assert "from transformers" not in card
    assert "vllm serve" not in card


def test_estimates_fit(tmp_path: Path) -> None:
    """What the plan says of bits and bytes is what is written."""
    folder = source("llama", tmp_path / "model", changes={"hidden_size": 256, "intermediate_size": 512})
    for name in ("w8a8", "w4a8", "w4a16-g128", "w4a16-channel"):
        result = planish.compress(quick(name), folder, tmp_path / name, dtype=torch.float32)
        tensors = read_header(tmp_path / name / SINGLE_FILE)
        assert sum(info.nbytes for info in tensors.values()) == pytest.approx(result.plan.out_bytes, rel=0.02)
        codes = [info for key, info in tensors.items() if key.rpartition(".")[2] in ("weight", "weight_packed", "weight_scale") and "proj" in key]
        weights = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
        assert 8 * sum(info.nbytes for info in codes) / weights == pytest.approx(result.plan.bits_per_weight, rel=0.01)


def test_all_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name too: every file and folder is synced after its last change."""
    fsync, publish, synced = os.fsync, compression.publish, dict[int, int]()

    def note(handle: int) -> None:
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_mtime_ns

    def checked(folder: Path, out: Path) -> None:
        assert len(paths := [folder, *folder.rglob("*")]) > 8
        assert [path for path in paths if synced.get(path.stat().st_ino) != path.stat().st_mtime_ns] == []
        publish(folder, out)
        assert synced[out.parent.stat().st_ino] == out.parent.stat().st_mtime_ns

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(compression, "publish", checked)
    planish.compress(quick("w4a4-fast"), source("llama", tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g128"])
def test_two_runs_write_the_same_bytes(name: str, tmp_path: Path) -> None:
    """From two copies of the model in other shards, into folders of other names; another seed gives other bytes."""
    folders = [source("qwen2", tmp_path / "one" / "model"), source("qwen2", tmp_path / "two" / "model", shard="60KB")]
    trees = []
    for i, folder in enumerate(folders):
        planish.compress(quick(name), folder, tmp_path / f"out{i}", dtype=torch.float32)
        trees.append(tree(tmp_path / f"out{i}"))
    assert trees[0] == trees[1]
    planish.compress(quick(name, "calibration.seed=1"), folders[0], tmp_path / "seed", dtype=torch.float32)
    other = tree(tmp_path / "seed")
    digests = [hashlib.sha256(files[SINGLE_FILE] or b"").hexdigest() for files in (trees[0], other)]
    assert digests[0] != digests[1]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder, out = source("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(planish.PlanishError, match="exists, and planish overwrites nothing"):
        planish.compress(RTN, folder, out)
    assert tree(out) == {"mine.txt": b"mine"}
