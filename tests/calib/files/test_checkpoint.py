"""What an opened checkpoint is and does."""

import resource
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, llama, merge, rewrite, save
from safetensors.torch import load_file
from tiny_models import CONFIGS, FAMILIES, MIXTURES, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from planish.calib.files.checkpoint import open_checkpoint
from planish.quant.errors import PlanishError


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def test_sharded_checkpoint(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(llama_folder)
    state = dict(model.named_parameters())  # without the tied head
    assert len(list(llama_folder.glob("*.safetensors"))) > 2
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
        found, expected = skeleton(ids).logits, reference(ids).logits
    if family in MIXTURES:  # transformers adds up experts in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if dtype is torch.bfloat16 else 1e-5)
    else:
        assert torch.equal(found, expected)
    assert checkpoint.tied == bool(CONFIGS[family].get("tie_word_embeddings"))
    assert not checkpoint.unused


def test_load_and_release_one_block(llama_folder: Path) -> None:
    checkpoint = open_checkpoint(llama_folder)
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


def test_persistent_buffers_load_and_computed_ones_stay(llama_folder: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(64))
            self.register_buffer("frequency", torch.full((2,), 0.1), persistent=False)

    module = Scaled()
    open_checkpoint(llama_folder).load_module(module, "model.norm")
    stored = open_checkpoint(llama_folder).read(["model.norm.weight"])["model.norm.weight"]
    assert torch.equal(module.get_buffer("weight"), stored.float())
    assert torch.equal(module.get_buffer("frequency"), torch.full((2,), 0.1))


def test_skeleton_leaves_the_configuration_alone(llama_folder: Path) -> None:
    checkpoint = open_checkpoint(llama_folder)
    before = checkpoint.config.to_dict()
    checkpoint.skeleton(torch.float32)
    assert checkpoint.config.to_dict() == before


def test_base_model_without_prefix(tmp_path: Path) -> None:
    model = tiny("gpt2")
    save(model.base_model, tmp_path)
    leftovers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, {**merge(tmp_path), **leftovers, "extra": torch.ones(1)})
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
def test_tied_head_that_is_stored_too(llama_folder: Path, same: bool) -> None:
    tensors = merge(llama_folder)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if same else embedding * 2
    rewrite(llama_folder, {**tensors, "lm_head.weight": head})
    checkpoint = open_checkpoint(llama_folder)
    assert checkpoint.tied is same
    assert checkpoint.config.tie_word_embeddings is same
    assert torch.equal(checkpoint.read(["lm_head.weight"])["lm_head.weight"], head)


def test_tied_embedding_stored_as_the_head_only(llama_folder: Path) -> None:
    tensors = merge(llama_folder)
    head = tensors.pop("model.embed_tokens.weight")
    rewrite(llama_folder, {**tensors, "lm_head.weight": head})
    checkpoint = open_checkpoint(llama_folder)
    assert checkpoint.tied
    assert checkpoint.tensors["model.embed_tokens.weight"].name == "lm_head.weight"


def test_fingerprint(llama_folder: Path, tmp_path: Path) -> None:
    before = open_checkpoint(llama_folder).fingerprint()
    moved = llama_folder.rename(tmp_path / "moved")
    assert open_checkpoint(moved).fingerprint() == before
    tensors = merge(moved)
    assert open_checkpoint(moved).fingerprint() == before
    tensors["model.norm.weight"][0] += 1
    rewrite(moved, tensors)
    changed = open_checkpoint(moved).fingerprint()
    assert changed != before
    edit_json(moved / "config.json", rms_norm_eps=0.5)
    assert open_checkpoint(moved).fingerprint() not in (before, changed)


def test_tokenizer_and_side_files(llama_folder: Path) -> None:
    (llama_folder / "LICENSE.txt").write_text("free")
    (llama_folder / "README.md").write_text("not carried over")
    checkpoint = open_checkpoint(llama_folder)
    assert checkpoint.tokenizer()("hello")["input_ids"] == [3]
    assert {str(path) for path in checkpoint.carry_over()} == {"LICENSE.txt", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    (llama_folder / "tokenizer.json").write_text("{")
    with pytest.raises(PlanishError, match=r"tokenizer\.json: not JSON"):
        checkpoint.tokenizer()
    (llama_folder / "tokenizer.json").unlink()
    with pytest.raises(PlanishError, match=r"no tokenizer\. Looked for tokenizer\.json, tokenizer\.model"):
        checkpoint.tokenizer()


def resident() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_reading_keeps_nothing_in_memory(llama_folder: Path) -> None:
    rows, size = 1_000_000, 128_000_000
    edit_json(llama_folder / "config.json", vocab_size=rows)
    rewrite(llama_folder, {**merge(llama_folder), "model.embed_tokens.weight": torch.ones(rows, 64, dtype=torch.bfloat16)})
    checkpoint = open_checkpoint(llama_folder)
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
