"""from_pretrained loads what planish wrote once planish is imported; without planish it fails; what is fully absorbed loads without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_compress import ids, quick, source
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import planish
from planish.calib.compressed.packed import pick_kernels
from planish.quant.errors import PlanishError
from planish.quant.kernels import PackedLinear
from planish.quant.kernels.joined import Part
from planish.quant.linear import QuantizedLinear

OWN = {
    "prefix": "[prefix: {tokens: [5, 7]}, shift, hadamard, cat: {block: 16}, clip]",
    "side": "[resq: {share: 0.25}, svdquant: {rank: 4}]",
}


def compressed(folder: Path, family: str, *settings: str, recipe: str = "w4a4-best") -> Path:
    planish.compress(quick(recipe, *settings), source(family, folder / "model", torch.float32), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(tmp_path_factory.mktemp("own"), "llama", f"steps={OWN['prefix']}")


def same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, with caches, padding and generate()."""
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids()], dim=1), torch.cat([padding, torch.ones_like(ids())], dim=1)
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, expected(ids()).logits)
        assert torch.equal(found(padded, attention_mask=mask).logits, expected(padded, attention_mask=mask).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for ways in ({}, {"cache_implementation": "static"}):
            pair = [model.generate(padded, attention_mask=mask, **options, **ways) for model in (found, expected)]  # type: ignore[operator]
            assert torch.equal(*pair)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_loads_as_planish_does(dtype: torch.dtype, own: Path) -> None:
    found, info = AutoModelForCausalLM.from_pretrained(own, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    same(found, planish.load(own, dtype=None if dtype == "auto" else dtype, device="cpu"))
    quick = dtype == torch.bfloat16 and pick_kernels("auto", dtype, "cpu")
    kinds = (Part, PackedLinear) if quick else QuantizedLinear
    assert sum(isinstance(module, kinds) and not name.endswith(".joined.linear") for name, module in found.named_modules()) == 21
    for model in (found, planish.load(own, device="cpu")):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(own.parent / "again")


@pytest.mark.parametrize(("family", "settings"), [("gpt2", ()), ("qwen2", ("steps=[svdquant: {rank: 4}, clip]",)), ("gemma2", ("steps=[hadamard]",))])
def test_other_families(family: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    out = compressed(tmp_path, family, *settings, recipe="w4a4-best" if settings else "w8a8")
    same(AutoModelForCausalLM.from_pretrained(out), planish.load(out, device="cpu"))


def test_a_body_without_its_head(own: Path) -> None:
    with torch.no_grad():
        assert torch.equal(
            AutoModel.from_pretrained(own)(ids()).last_hidden_state, planish.load(own, device="cpu").base_model(ids()).last_hidden_state
        )


def test_more_than_one_device_is_refused(own: Path) -> None:
    with pytest.raises(PlanishError, match="device_map: the model would lie in"):
        AutoModelForCausalLM.from_pretrained(own, device_map={"": "cpu", "lm_head": "disk"}, offload_folder=own.parent / "offload")


def test_the_readers_of_a_site_transform_its_input_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planish.load(own, device="cpu")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    calls: list[object] = []
    prepare = QuantizedLinear.prepare
    monkeypatch.setattr(QuantizedLinear, "prepare", lambda self, x: (calls.append(self), prepare(self, x))[1])
    with torch.no_grad():
        once = model(ids()).logits
        assert len(calls) == 12  # of 21 layers in 3 blocks
        for layer in layers:
            layer.shared = None
        assert torch.equal(model(ids()).logits, once)


def python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """In a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def test_either_order_of_imports_will_do_and_planish_alone_is_quick(own: Path) -> None:
    load = "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    quickly = "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'planish imports too much'"
    before = python(
        f"import sys, planish; {quickly}; from transformers import AutoModelForCausalLM; print(type({load}.model.layers[0].mlp.up_proj))", own
    )
    assert "QuantizedLinear" in before.stdout, before.stderr
    after = python(f"import sys, transformers.quantizers.auto; from transformers import AutoModelForCausalLM; import planish; {load}", own)
    assert after.returncode == 0, after.stderr


STOCK = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1]); assert 'planish' not in sys.modules"


@pytest.mark.parametrize("kind", ["transformed", "side", "transposed", "eight-bits"])
def test_transformers_alone_refuses(kind: str, own: Path, tmp_path: Path) -> None:
    """With an error, and words that lead to planish; never with random weights."""
    match kind:
        case "transformed":
            folder = own
        case "transposed":
            folder = compressed(tmp_path, "gpt2", recipe="w8a8")
        case "side":
            folder = compressed(tmp_path, "llama", f"steps={OWN['side']}")
        case _:
            folder = compressed(tmp_path, "llama", "steps=[hadamard]", "scheme.weights.bits=8", "scheme.activations.bits=8")
    ran = python(STOCK, folder)
    assert ran.returncode != 0
    assert "Unknown quantization type, got planish" in ran.stderr
    assert "MISMATCH" in ran.stderr
    assert "RuntimeError" in ran.stderr


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16-channel"])
def test_transformers_alone_loads_what_is_absorbed(recipe: str, tmp_path: Path) -> None:
    ran = python(STOCK, compressed(tmp_path, "llama", recipe=recipe))
    assert ran.returncode == 0, ran.stderr
    assert "MISSING" not in ran.stderr


def test_a_layout_of_other_consumers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"export.layout: int-quantized is for other consumers"):
        compressed(tmp_path, "llama", "steps=[hadamard]", "export.layout=int-quantized")
