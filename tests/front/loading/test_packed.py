"""planish.load on packed kernels: what QuantizedLinear computes but for rounding, with transforms, side paths, prefix, caches and padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, outlying, quick, source
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import planish
from planish.calib.compressed import packed
from planish.calib.compressed.packed import GatedMlp, RmsNorm, kernels_used
from planish.quant.errors import PlanishError
from planish.quant.kernels import PackedLinear, attention, cpu, native, tiles
from planish.quant.kernels.joined import Part
from planish.quant.linear import QuantizedLinear

CASES = {
    "w8a8": ("llama", "w8a8", ()),
    "w8a8 static": ("llama", "w8a8-static", ()),
    "w4a8": ("mistral", "w4a8", ()),
    "biases": ("qwen2", "w8a8", ()),
    "layer norms": ("gpt2", "w8a8", ()),
    "other norms": ("gemma2", "w8a8", ()),
    "norms of heads": ("qwen3", "w8a8", ()),
    "weight only": ("llama", "w4a16-channel", ()),
    "transforms and prefix": ("llama", "w4a4-best", ("steps=[prefix: {tokens: [5, 7]}, shift, hadamard, cat: {block: 16}, clip]",)),
    "side paths": ("llama", "w4a4-best", ("steps=[svdquant: {rank: 4}]",)),
    "kept channels": ("llama", "w4a4-best", ("steps=[resq: {share: 0.25}]",)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (family, recipe, settings) in CASES.items():
        folder = tmp_path_factory.mktemp("packed")
        planish.compress(quick(recipe, *settings), source(family, folder / "model", torch.bfloat16), folder / "out")
        made[name] = folder / "out"
    return made


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(ids()).logits
    return found.float()


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does(name: str, folders: dict[str, Path]) -> None:
    exact, half = (planish.load(folders[name], dtype=dtype, device="cpu", kernels="reference") for dtype in (torch.float32, torch.bfloat16))
    wide, auto = planish.load(folders[name], dtype=torch.float32, device="cpu", kernels="packed"), planish.load(folders[name], device="cpu")
    assert not any(isinstance(module, Part | PackedLinear | RmsNorm | GatedMlp) for model in (exact, half) for module in model.modules())
    assert distance(logits(wide), logits(exact)) < 5e-3  # a code that last bits moved
    assert distance(logits(auto), logits(exact)) <= 1.5 * distance(logits(half), logits(exact)) + 1e-3


def kinds(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is kind and not name.endswith(".joined.linear")}


def test_what_runs_on_what(folders: dict[str, Path]) -> None:
    quick_codes = tiles.engine() or torch.cpu.get_capabilities().get("avx512_vnni")
    model = planish.load(folders["w8a8"], dtype=torch.bfloat16, device="cpu", kernels="packed")
    assert kinds(model, Part) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert kinds(model, PackedLinear) == {"o_proj", "down_proj"}
    compiled = native.found().library is not None
    apart = {"input_layernorm", "post_attention_layernorm"} if tiles.engine() else set()  # else their readers do what they did
    assert kinds(model, RmsNorm) == ({*apart, "norm"} if compiled else set())
    assert kinds(model, GatedMlp) == ({"mlp"} if compiled else set())
    used = kernels_used(model)
    assert used["model.layers.0.self_attn.q_proj"] == "packed, one product with its site's other readers"
    assert used["model.layers.2.mlp.down_proj"] == "packed"
    said = "rotary embedding in one pass" + ", attention in one pass" * attention.wins()
    assert used.get("model.layers.1.self_attn") == (said if compiled else None)
    in_float32 = {} if cpu.multiplies_bfloat16() else {"lm_head": "full precision, products in float32"}
    assert used.get("lm_head") == in_float32.get("lm_head")
    assert len(used) == 21 + (3 + 6 + 1 + 3) * compiled + len(in_float32)
    assert (type(planish.load(folders["w8a8"], device="cpu").model.layers[0].mlp.down_proj) is PackedLinear) == bool(quick_codes)
    assert kinds(planish.load(folders["w8a8"], dtype=torch.float32, device="cpu"), PackedLinear) == set()
    kept = planish.load(folders["kept channels"], device="cpu", kernels="packed")
    assert set(kernels_used(kept).values()) <= {"reference", "one pass", said, *in_float32.values()}
    assert kinds(planish.load(folders["other norms"], device="cpu", kernels="packed"), RmsNorm) == set()
    low = planish.load(folders["side paths"], device="cpu", kernels="packed")
    assert kinds(low, PackedLinear) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    weight_only = planish.load(folders["weight only"], dtype=torch.float32, device="cpu", kernels="packed")
    assert bool(kinds(weight_only, PackedLinear)) == native.there("weight_only_float32")  # torch's kernel knows bfloat16 only


@pytest.mark.parametrize("name", ["w8a8", "transforms and prefix", "weight only"])
def test_caches_batches_and_padding(name: str, folders: dict[str, Path]) -> None:
    """A step goes on where a pass over all tokens would be; rows of a batch do not see each other. In float32 where last bits move 4-bit codes."""
    dtype = torch.float32 if name == "transforms and prefix" else torch.bfloat16
    model = planish.load(folders[name], dtype=dtype, device="cpu", kernels="packed")
    with torch.no_grad():
        whole = model(ids()).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
            first = model(ids()[:, :-1], past_key_values=cache, use_cache=True)
            step = model(ids()[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
            assert distance(step[:, -1].float(), whole[:, -1].float()) < 0.03
        assert distance(model(ids()[:1]).logits.float(), whole[:1].float()) < 0.03
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        padded, mask = (torch.cat([torch.full((2, 3), fill), there], 1) for fill, there in ((0, ids()), (0, torch.ones_like(ids()))))
        grown = [model.generate(ids(), **options), model.generate(ids(), **options, cache_implementation="static")]
        assert grown[0].shape == (2, ids().shape[1] + 5)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        assert distance(model(padded, attention_mask=mask, position_ids=places).logits[:, 3:].float(), whole.float()) < 0.05
        assert torch.equal(grown[0][:, : ids().shape[1] + 1], grown[1][:, : ids().shape[1] + 1])


def test_from_pretrained_takes_them_too(folders: dict[str, Path]) -> None:
    folder = folders["transforms and prefix"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(planish.load(folder, device="cpu")))


def test_outliers_and_other_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planish.compress(quick("w8a8"), outlying(tmp_path / "model"), tmp_path / "out")
    exact = logits(planish.load(tmp_path / "out", dtype=torch.float32, kernels="reference", device="cpu"))
    half = distance(logits(planish.load(tmp_path / "out", kernels="reference", device="cpu")), exact)
    found = [logits(planish.load(tmp_path / "out", kernels="packed", device="cpu"))]
    monkeypatch.setattr(tiles, "engine", lambda: 0)
    without = planish.load(tmp_path / "out", kernels="packed", device="cpu")
    assert kinds(without, packed.Passed) == ({"input_layernorm", "post_attention_layernorm"} if native.found().library else set())
    found.append(logits(without))
    monkeypatch.setattr(native, "found", lambda: native.Found(None, "test"))
    found.append(logits(planish.load(tmp_path / "out", kernels="packed", device="cpu")))
    assert all(distance(one, exact) <= 1.5 * half + 1e-3 for one in found)


def test_a_gated_mlp_quantizes_its_input_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no pass of the CPU's does it, as on a GPU."""
    monkeypatch.setattr(tiles, "engine", lambda: 0)
    mlp = planish.load(folders["w8a8"], device="cpu", kernels="packed", dtype=torch.bfloat16).model.layers[0].mlp
    assert isinstance(mlp, GatedMlp)
    x = torch.randn(3, mlp.width).bfloat16()
    expected = mlp(x)
    asked: list[torch.Size] = []
    codes = PackedLinear.codes
    monkeypatch.setattr(PackedLinear, "codes", lambda self, x: (asked.append(x.shape), codes(self, x))[1])
    monkeypatch.setattr(cpu, "gated_codes", lambda *_: None)
    assert distance(mlp(x).float(), expected.float()) < 0.02
    assert asked == [x.shape]


@pytest.mark.parametrize("load", [planish.load, AutoModelForCausalLM.from_pretrained])
def test_keys_and_values_in_codes(load: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_KERNELS", "packed")
    model = source("llama", tmp_path / "model")
    for name, settings in {"free": (), "held": ("kv_cache={bits: 3}",)}.items():
        planish.compress(quick("w4a4-fast", *settings), model, tmp_path / name)
    free, held = (logits(load(tmp_path / name, dtype=torch.float32)) for name in ("free", "held"))
    exact = logits(planish.load(tmp_path / "held", dtype=torch.float32, device="cpu", kernels="reference"))
    assert distance(held, exact) < 0.3 * distance(free, exact)


@pytest.mark.parametrize("name", ["w8a8", "side paths", "weight only"])
def test_untested_devices_are_held_against_the_reference(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for one: all packed while kernels are right, all reference, and a warning, when an operator is not."""
    monkeypatch.setattr(packed, "_TESTED", ())
    model = planish.load(folders[name], device="cpu", dtype=torch.bfloat16, kernels="packed")
    assert not kinds(model, QuantizedLinear)
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: right(self, x) * (1.2 if len(x) > 1 else 1.0))
    with pytest.warns(UserWarning, match=r"is off by 0\.20?\d? of its output on this cpu: the reference runs instead"):
        model = planish.load(folders[name], device="cpu", dtype=torch.bfloat16, kernels="packed")
    assert not kinds(model, PackedLinear)
    assert not kinds(model, Part)


def test_nan_of_few_tokens_is_not_forgotten(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_TESTED", ())
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: right(self, x) * (torch.nan if len(x) == 1 else 1.0))
    with pytest.warns(UserWarning, match="is off by nan of its output"):
        model = planish.load(folders["w8a8"], device="cpu", dtype=torch.bfloat16, kernels="packed")
    assert not kinds(model, PackedLinear)


def test_kernels_that_fail_on_untested_devices_leave_the_reference(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a tile finds too little memory, or Triton no C compiler; a package that can be installed is asked for."""
    monkeypatch.setattr(packed, "_TESTED", ())
    failure: Exception = MemoryError("out of resource: shared memory")

    def fails(self: PackedLinear, x: Tensor) -> Tensor:
        raise failure

    monkeypatch.setattr(PackedLinear, "forward", fails)
    with pytest.warns(UserWarning, match=r"A packed layer of \d+ x \d+ fails on this cpu \(MemoryError: out of resource"):
        model = planish.load(folders["w8a8"], device="cpu", dtype=torch.bfloat16, kernels="packed")
    assert not kinds(model, PackedLinear)
    assert not kinds(model, Part)
    failure = PlanishError("install it")
    with pytest.raises(PlanishError, match="install it"):
        planish.load(folders["w8a8"], device="cpu", dtype=torch.bfloat16, kernels="packed")


def test_what_auto_means(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_KERNELS", "reference")
    assert kinds(planish.load(folders["w8a8"], device="cpu"), QuantizedLinear)
    assert kinds(AutoModelForCausalLM.from_pretrained(folders["transforms and prefix"]), QuantizedLinear)
    assert not kinds(planish.load(folders["w8a8"], device="cpu", kernels="packed"), QuantizedLinear)
    monkeypatch.setenv("PLANISH_KERNELS", "fast")
    with pytest.raises(PlanishError, match=r"PLANISH_KERNELS=fast\. Give one of auto, packed, reference, or unset it"):
        planish.load(folders["w8a8"], device="cpu")
    monkeypatch.delenv("PLANISH_KERNELS")
    monkeypatch.setattr(packed, "find_spec", lambda _: object())
    for capability, packs in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert [packed.pick_kernels("auto", dtype, "cuda") for dtype in (torch.bfloat16, torch.float32)] == [packs, False]
    monkeypatch.setattr(packed, "find_spec", lambda _: None)
    assert not packed.pick_kernels("auto", torch.bfloat16, "cuda")


def test_a_module_that_only_looks_alike_stays(folders: dict[str, Path]) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    norm = Shifted()
    alike = RmsNorm.of(norm)
    assert alike is not None
    assert not packed.agree(norm, alike, 8, torch.float32, torch.device("cpu"))
    norm.weight.data.mul_(0)
    assert RmsNorm.of(nn.Identity()) is None
    assert GatedMlp.of(nn.Sequential()) is None
    mlp = planish.load(folders["w8a8"], device="cpu", kernels="packed", dtype=torch.bfloat16).model.layers[0].mlp
    assert isinstance(mlp, GatedMlp)
    whole = nn.Module()
    for name, child in mlp.named_children():
        whole.add_module(name, child)
    twin = GatedMlp.of(whole)
    assert twin is not None
    whole.forward = lambda x: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))  # type: ignore[method-assign]
    assert not packed.agree(whole, twin, twin.width, torch.bfloat16, torch.device("cpu"))


def test_errors(folders: dict[str, Path]) -> None:
    with pytest.raises(PlanishError, match=r"kernels is 'fast'\. Give one of auto, packed, reference"):
        planish.load(folders["w8a8"], kernels="fast")  # type: ignore[arg-type]
    with pytest.raises(PlanishError, match="Load the model on meta"):
        planish.load(folders["w8a8"], device="cpu", kernels="packed").to("meta")


@pytest.mark.slow
def test_compiles_as_one_graph(folders: dict[str, Path]) -> None:
    model = planish.load(folders["w8a8"], device="cpu", kernels="packed")
    compiled = torch.compile(lambda x: model(x, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert distance(compiled(ids()).float(), logits(model)) < 0.03
