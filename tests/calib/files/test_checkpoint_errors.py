"""Models that cannot be compressed: each is refused with one message that says what and where."""

import json
import struct
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers_checkpoint import edit_json, llama, merge, refused, rewrite
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from planish.calib.files import locate
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.shards import INDEX_FILE
from planish.quant.errors import PlanishError


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path / "none", "none: no such folder", "demo:smollm2")
    refused("nowhere", "nowhere: no such folder", "org/name")
    refused("absent.gguf", "absent.gguf: no such folder")
    refused("some-body/no-model", "some-body/no-model: no such folder", "Hub cannot be reached")
    refused("demo:smolm2", "no such demo model", "Did you mean smollm2?")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "a file", "Give the folder")


def test_hub_download(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(llama_folder)

    monkeypatch.setattr(locate, "snapshot_download", download)
    assert open_checkpoint("org/name").path == llama_folder
    assert len(asked) == 1
    assert not any("bin" in pattern for pattern in asked[0] if pattern != "sentencepiece.bpe.model")
    for shard in llama_folder.glob("*.safetensors"):
        shard.unlink()
    refused("org/name", "no safetensors weights")
    refused("org/name", "missing", allow_pickle=True)
    assert "pytorch_model*.bin" in asked[-1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (HFValidationError("two dashes"), "not a valid Hub name"),
        (ConnectionResetError("in the middle"), "the download from the Hub failed (in the middle)"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(locate, "snapshot_download", download)
    refused("org/name", "org/name: no such folder", words)


def test_configuration_missing_or_broken(llama_folder: Path) -> None:
    path = llama_folder / "config.json"
    good = path.read_text()
    for text, words in (("{", "not JSON"), ("[1]", "a JSON list, not an object"), ("", "not JSON")):
        path.write_text(text)
        refused(llama_folder, "config.json", words)
    path.write_text(good)
    for change in (
        {"model_type": "flying_carpet"},
        {"model_type": None},
        {"model_type": "clip"},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "unheard"},
    ):
        path.write_text(good)
        edit_json(path, **change)
        refused(llama_folder, "config.json", "transformers builds no causal language model")
    path.unlink()
    refused(llama_folder, "config.json: no such file")


def test_already_quantized(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(llama_folder, "quantization_config", "already quantized")
    edit_json(llama_folder / "config.json", quantization_config=None)
    tensors = merge(llama_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    rewrite(llama_folder, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    refused(llama_folder, name, "float8_e4m3fn", "quantized model")
    rewrite(llama_folder, {**tensors, name: tensors[name].to(torch.int8)})
    refused(llama_folder, name, "int8", "quantized model")
    rewrite(llama_folder, {**without, "model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)})
    refused(llama_folder, "up_proj.qweight", "int32", "quantized model")


def test_other_dtype(llama_folder: Path) -> None:
    tensors = merge(llama_folder)
    rewrite(llama_folder, {**tensors, "model.norm.weight": tensors["model.norm.weight"].double()})
    refused(llama_folder, "model.norm.weight", "float64", "bfloat16, float16 and float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_that_are_read(llama_folder: Path, dtype: torch.dtype) -> None:
    tensors = merge(llama_folder)
    rewrite(llama_folder, {name: value.to(dtype) if value.dim() > 1 else value for name, value in tensors.items()})
    assert open_checkpoint(llama_folder).dtype == dtype


def test_no_weights(llama_folder: Path) -> None:
    for path in llama_folder.glob("*.safetensors"):
        path.rename(llama_folder / f"{path.stem}-copy.safetensors")
    (llama_folder / INDEX_FILE).unlink()
    refused(llama_folder, f"safetensors files but no {INDEX_FILE}")
    for path in llama_folder.glob("*.safetensors"):
        path.unlink()
    refused(llama_folder, "no weights", "model.safetensors")


def test_one_file_of_any_name(llama_folder: Path) -> None:
    merge(llama_folder)
    (llama_folder / "model.safetensors").rename(llama_folder / "weights.safetensors")
    open_checkpoint(llama_folder).check_finite()


def test_shard_missing(llama_folder: Path) -> None:
    shards = sorted(llama_folder.glob("*.safetensors"))
    shards[1].unlink()
    refused(llama_folder, f"1 of {len(shards)} weight files missing", shards[1].name)


def test_shard_truncated_or_too_long(llama_folder: Path) -> None:
    shard = sorted(llama_folder.glob("*.safetensors"))[1]
    good = shard.read_bytes()
    for cut, words in ((len(good) - 1, "truncated"), (100, "wrong header"), (4, "wrong header"), (0, "wrong header")):
        shard.write_bytes(good[:cut])
        refused(llama_folder, shard.name, words)
    shard.write_bytes(good + b"x")
    refused(llama_folder, shard.name, "longer than its header says")


def header(entries: object, data: int = 0) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "wrong header"),
        (header(b"{nonsense"), "wrong header: not JSON"),
        (header([1]), "not a JSON object"),
        (header({"a": 5}), "no valid data_offsets"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}), "no valid data_offsets"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4), "no valid dtype and shape"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4), "cannot fill bytes 0 to 4"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8), "cannot fill bytes 4 to 8"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1), "dtype F4"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git LFS pointer"),
    ],
)
def test_wrong_header(llama_folder: Path, content: bytes, words: str) -> None:
    merge(llama_folder)
    (llama_folder / "model.safetensors").write_bytes(content)
    refused(llama_folder, "model.safetensors", words)


def test_index_that_lies(llama_folder: Path) -> None:
    index = json.loads((llama_folder / INDEX_FILE).read_text())["weight_map"]
    first, last = sorted(set(index.values()))[:: len(set(index.values())) - 1]
    edit_json(llama_folder / INDEX_FILE, weight_map={**index, "model.norm.weight": first if index["model.norm.weight"] == last else last})
    refused(llama_folder, "has no tensor model.norm.weight", INDEX_FILE)
    edit_json(llama_folder / INDEX_FILE, weight_map={**index, "model.norm.weight": "../elsewhere.safetensors"})
    refused(llama_folder, "../elsewhere.safetensors", "no file name")
    edit_json(llama_folder / INDEX_FILE, weight_map={})
    refused(llama_folder, "no weight_map")


def test_parameter_missing(llama_folder: Path) -> None:
    tensors = merge(llama_folder)
    norm = tensors.pop("model.norm.weight")
    rewrite(llama_folder, tensors)
    refused(llama_folder, "the weights lack model.norm.weight", "LlamaForCausalLM", "Download the checkpoint again")
    rewrite(llama_folder, {**tensors, "model.final.weight": norm})
    refused(llama_folder, "the weights lack model.norm.weight", "It has model.final.weight")
    edit_json(llama_folder / "config.json", tie_word_embeddings=False)
    rewrite(llama_folder, {**tensors, "model.norm.weight": norm})
    refused(llama_folder, "the weights lack lm_head.weight")


def test_shape_mismatch(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", intermediate_size=100)
    refused(llama_folder, "mlp.down_proj.weight", "(64, 96)", "(64, 100)", "config.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position", [0, 1, 6400, 12799])
def test_not_finite(llama_folder: Path, dtype: torch.dtype, position: int) -> None:
    tensors = merge(llama_folder)
    broken = torch.full((200, 64), torch.finfo(dtype).max, dtype=dtype)
    rewrite(llama_folder, {**tensors, "model.embed_tokens.weight": broken})
    open_checkpoint(llama_folder).check_finite()
    broken.view(-1)[position] = float("nan")
    broken.view(-1)[position ^ 1] = float("-inf")
    rewrite(llama_folder, {**tensors, "model.embed_tokens.weight": broken})
    checkpoint = open_checkpoint(llama_folder)
    with pytest.raises(PlanishError, match=r"tensor model\.embed_tokens\.weight has 1 NaN and 1 infinite values of 12800"):
        checkpoint.check_finite()
