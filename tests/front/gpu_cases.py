"""planish on a GPU. Run by test_pretended.py, in a process of its own, on one that is not there (pretended_gpu.py), and by hand on a real one:

    PLANISH_TEST_GPU=cuda pytest -n 8 -m "slow or not slow" tests/front/gpu_cases.py

There sums have another order, so that what is compared may differ by single codes.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from helpers_compress import STEPS, distance, ids, quick, source
from helpers_front import invoke
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, StaticCache
from transformers.integrations import sdpa_attention

import planish
from planish.calib.compressed.packed import ENVIRONMENT, Kernels, kernels_used
from planish.calib.files.checkpoint import open_checkpoint
from planish.planning.preflight import make_plan
from planish.quant.errors import PlanishError
from planish.quant.solvers import columns
from planish.recipe.shipped import shipped

REAL = "PLANISH_TEST_GPU" in os.environ
if not REAL:
    import pretended_gpu
GPU = os.environ["PLANISH_TEST_GPU"] if REAL else pretended_gpu.NAME
pretended = pytest.mark.skipif(REAL, reason="of the pretended GPU")
real = pytest.mark.skipif(not REAL, reason="of a real GPU")
CLOSE = 0.05 if REAL else 1e-5
EIGHT = ("scheme.weights.bits=8", "scheme.activations.bits=8")  # so that last bits decide little
NARROW = {  # what does not fit tiny models; and in 4 bits codes that jump by last bits widen what a block learns together to all there is
    "paper-flatquant": EIGHT,
    "paper-quad": ("steps=[quad: {rank: 4}]",),
    "paper-svdquant": ("scheme.weights.group_size=32", "scheme.activations.group_size=32"),
}
# By a way back, whose sums have another order there, which descent widens.
LEARNED = {"paper-flatquant": 0.1, "paper-spinquant": 0.05, "w4a4-learned": 0.05, "w4a4-portable-mixed": 0.05}
MORE = {
    "bare": ("steps=[]",),
    "polish": ("steps=[hadamard, polish: {steps: 2}]",),
    "prefix": ("steps=[prefix: {tokens: auto}, hadamard]",),
    "raised": ("steps=[hadamard, raise_activations: {bits: 8, share: 0.25}]",),
    "attention": ("steps=[hadamard]", "solver.gptaq.attention=true"),
    "settings": ("steps=[hadamard]", "solver={gptaq: {alpha: [0, 0.5]}}"),
    "keys and values": ("steps=[rotate: {at: keys}]", "kv_cache={bits: 4}"),
    "super weights": ("steps=[super_weight: {places: auto, z: 12}]",),
    "low rank": ("steps=[smooth: {strength: auto}, svdquant: {rank: 4, rounds: 2}]",),
    "seeds": ("steps=[fold_norms, rotate: {at: residual, seeds: 2}]",),
    "groups": ("steps=[]", "scheme.weights={bits: 4, granularity: group, group_size: 16}", "solver={gptq: {order: diagonal}}"),
    "static": ("steps=[]", "scheme.activations={bits: 8, symmetric: false, granularity: tensor, dynamic: false}"),
    "rounded": ("steps=[clip]", "solver=rtn"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source("llama", tmp_path_factory.mktemp("model") / "llama", torch.float32)


def check_same(recipe: planish.Recipe, model: Path, folder: Path, bound: float = 1e-3) -> None:
    """What was compressed on the GPU is what was on the CPU. bound: of their logits' distance, in theirs."""
    with sdpa_kernel(SDPBackend.MATH):
        planish.compress(recipe, model, folder / "cpu", device="cpu", dtype=torch.float32)
        planish.compress(recipe, model, folder / "gpu", device=GPU, dtype=torch.float32)
    with torch.no_grad():
        logits = [planish.load(folder / name, device="cpu", dtype=torch.float32)(ids()).logits for name in ("cpu", "gpu")]
    assert distance(*logits) <= max(0.2 if REAL else 0, bound)


@pytest.mark.parametrize("name", ["w8a8", "w4a4-fast", "w4a4-best", "paper-quarot"])
def test_recipe(name: str, model: Path, tmp_path: Path) -> None:
    check_same(quick(name), model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_every_recipe(name: str, model: Path, tmp_path: Path) -> None:
    check_same(quick(name, *NARROW.get(name, ())), model, tmp_path, LEARNED.get(name, 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("step", [*STEPS, *MORE])
def test_every_step(step: str, model: Path, tmp_path: Path) -> None:
    eight = () if step in MORE else EIGHT
    learns = step in ("flat", "flat, whole block", "R1, learned", "R2, learned", "polish")
    check_same(quick("w4a4-best", *MORE.get(step, (f"steps=[{STEPS.get(step)}]",)), *eight), model, tmp_path, 0.05 if learns else 1e-3)


@pytest.mark.parametrize("kernels", ["reference", "packed"])
@pytest.mark.parametrize("name", ["w4a4-fast", "w8a8-static", "w4a8", "w4a16-g128", "paper-lorc", "w4a4-nvfp4"])
def test_loaded(name: str, kernels: Kernels, model: Path, tmp_path: Path) -> None:
    """A batch, one padded on the left, and what is generated with a cache that grows and one that does not."""
    planish.compress(quick(name), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    tokens = ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        here = planish.load(tmp_path / "out", device="cpu", kernels="reference")
        there = planish.load(tmp_path / "out", device=GPU, kernels=kernels)
        assert {tensor.device.type for tensor in [*there.parameters(), *there.buffers()]} == {torch.device(GPU).type}
        used = set(kernels_used(there).values())
        assert any(kind.startswith("reference" if name == "w4a4-nvfp4" else kernels) for kind in used)
        if name == "w4a8" and kernels == "packed":
            assert REAL or {"in one pass with its readers' quantization", "SiLU, product and quantization in one pass"} <= used
        assert distance(there(tokens.to(GPU)).logits.cpu(), here(tokens).logits) <= CLOSE
        padded = there(tokens.to(GPU), attention_mask=mask.to(GPU)).logits.cpu()
        assert distance(padded[mask == 1], here(tokens, attention_mask=mask).logits[mask == 1]) <= CLOSE
        expected = here.generate(tokens[:1], max_new_tokens=3, do_sample=False)
        for cache in ("dynamic", "static"):
            found = there.generate(tokens[:1].to(GPU), max_new_tokens=3, do_sample=False, cache_implementation=cache)
            assert found.shape == expected.shape if REAL else found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["w8a8", "w4a4-fast"])
def test_mixture_of_experts(name: str, tmp_path: Path) -> None:
    mixture = source("qwen2_moe", tmp_path / "model", torch.float32)
    check_same(quick(name, *EIGHT), mixture, tmp_path)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        here = planish.load(tmp_path / "cpu", device="cpu", kernels="reference")(ids()).logits
        for kernels in ("reference", "packed"):
            there = planish.load(tmp_path / "cpu", device=GPU, kernels=kernels)
            assert {tensor.device.type for tensor in [*there.parameters(), *there.buffers()]} == {torch.device(GPU).type}
            assert distance(there(ids().to(GPU)).logits.cpu(), here) <= max(CLOSE, 1e-3)


def test_floats_run_on_the_gpus_own_product(model: Path, tmp_path: Path) -> None:
    """In 16 bits; in float32 they run on the reference, for that product is rounded to bfloat16."""
    planish.compress(quick("w8a8-fp8"), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exact, half = (
            planish.load(tmp_path / "out", device="cpu", dtype=dtype, kernels="reference")(ids()).logits.float()
            for dtype in (torch.float32, torch.bfloat16)
        )
        there = planish.load(tmp_path / "out", device=GPU, dtype=torch.bfloat16, kernels="packed")
        assert "packed" in kernels_used(there).values()
        assert distance(there(ids().to(GPU)).logits.float().cpu(), exact) <= 2 * distance(half, exact)
        wide = planish.load(tmp_path / "out", device=GPU, dtype=torch.float32, kernels="packed")
        assert "packed" not in kernels_used(wide).values()
        assert distance(wide(ids().to(GPU)).logits.cpu(), exact) <= CLOSE


@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_loaded_where_the_gpu_is_torch_s_default(kernels: Kernels, model: Path, tmp_path: Path) -> None:
    planish.compress(quick("w4a4-fast"), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = planish.load(tmp_path / "out", device="cpu", kernels="reference")(ids()).logits
        with torch.device(GPU):
            there = planish.load(tmp_path / "out", device=GPU, kernels=kernels)
        assert distance(there(ids().to(GPU)).logits.cpu(), expected) <= CLOSE


@pytest.mark.parametrize("kernels", ["reference", "packed"])
@pytest.mark.parametrize("name", ["w8a8", "w4a4-best", "w4a16-g128", "paper-resq"])
def test_nothing_waits(name: str, kernels: Kernels, model: Path, tmp_path: Path) -> None:
    """A step of generation crosses no border between CPU and GPU once the first is done, so that a CUDA graph holds it; with a prefix and without."""
    planish.compress(quick(name), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    loaded = planish.load(tmp_path / "out", device=GPU, kernels=kernels)
    tokens, place = ids(1, 8).to(GPU), torch.tensor([[8]]).to(GPU)
    with torch.no_grad():
        cache = StaticCache(config=loaded.config, max_cache_len=32)
        loaded(tokens, past_key_values=cache, use_cache=True)

        def step() -> Tensor:
            logits: Tensor = loaded(tokens[:, :1], past_key_values=cache, use_cache=True, position_ids=place).logits
            return logits

        step()
        if not REAL:
            pretended_gpu.CROSSINGS.clear()
            step()
            assert not pretended_gpu.CROSSINGS
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = step()
            graph.replay()
            assert found.isfinite().all()


def test_from_pretrained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded there, or moved there: then on the reference, for packed weights stay where they were packed."""
    planish.compress(quick("w4a4-fast", *EIGHT), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    tokens = ids(1, 8)
    with torch.no_grad():
        expected = planish.load(tmp_path / "out", device="cpu")(tokens).logits
        monkeypatch.setenv(ENVIRONMENT, "packed")
        mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=GPU)
        assert "packed" in kernels_used(mapped).values()
        with pytest.raises(planish.PlanishError, match=f"Load the model on {GPU}"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(GPU)
        monkeypatch.setenv(ENVIRONMENT, "reference")
        for there in (mapped, AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(GPU), planish.load(tmp_path / "out", device="cpu").to(GPU)):
            assert distance(there(tokens.to(GPU)).logits.cpu(), expected) <= (0.05 if REAL else 1e-3)
            assert there.generate(tokens.to(GPU), max_new_tokens=2).device.type == torch.device(GPU).type


@pretended
def test_a_model_may_yet_be_moved_to_a_gpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is not packed for the CPU where there is one."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    planish.compress(quick("w4a4-fast"), model, tmp_path / "out", device="cpu", dtype=torch.float32)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        loaded = planish.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
        assert ("reference" in kernels_used(loaded).values()) == gpu


def test_commands(model: Path, tmp_path: Path) -> None:
    text, out, where = tmp_path / "text.txt", tmp_path / "out", ("--device", GPU)
    text.write_text(" ".join(f"the {i} and of a word is {i * 7 % 13} there" for i in range(3000)))
    quickly = [part for setting in ("samples=4", "length=32", "batch_size=2") for part in ("--set", f"calibration.{setting}")]
    measured = ("--text", text, "--windows", "2", "--length", "32", *where)
    for command in (
        ("compress", "w4a4-fast", "--model", model, "--out", out, "--offload-dir", tmp_path / "streams", *quickly, *where),
        ("verify", out, "--against", model, *measured),
        ("eval", out, "--against", model, *measured),
        ("layers", out, "--against", model, "--sites", "2", *measured),
        ("search", "w4a16-channel", "--model", model, "--budget", "5bpw", "--out", tmp_path / "found.yaml", *quickly, *where),
        ("inspect", model, *where),
    ):
        ran = invoke(*command)
        assert ran.code == 0, ran.err
        if command[0] == "compress":
            assert re.search(rf"on {GPU} [\d.]+ [kMG]?B" if REAL else f"on {GPU} 123.0 MB", ran.out)
            assert f"on {GPU} at most, activations on disk" in ran.out + ran.err


@pytest.mark.parametrize("name", ["w8a8", "w4a4-best", "paper-resq", "paper-quarot"])
def test_resumed(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last block, in the bytes of a run that was not stopped."""
    recipe = quick(name, "kv_cache={bits: 8}") if name == "w4a4-best" else quick(name)
    planish.compress(recipe, model, tmp_path / "whole", device=GPU)

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(recipe, model, tmp_path / "out", device=GPU)
    planish.compress(recipe, model, tmp_path / "out", device=GPU)
    weights = "model.safetensors"
    assert REAL or (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pretended
def test_room_is_the_gpu_s(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(quick("w8a8"), model, device=GPU)
    assert not plan.offload
    monkeypatch.setattr(pretended_gpu.BACKEND, "free", plan.memory.total - plan.memory.program)
    assert make_plan(quick("w8a8"), model, device=GPU).offload
    monkeypatch.setattr(pretended_gpu.BACKEND, "free", 1000)
    with pytest.raises(PlanishError, match=r"1\.0 kB free, but the run needs about .* there, with activations on disk"):
        make_plan(quick("w8a8"), model, device=GPU)


@real
def test_columns_are_rounded_in_one_launch() -> None:
    """By the kernel's own trial, which warns where it fails or is wrong."""
    assert columns.launched(torch.zeros(1, 1, device=GPU))


@pretended
def test_a_plan_counts_what_is_launched_for_columns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen operations for each that the solver rounds; with attention each row of a head by itself besides."""
    config = open_checkpoint(model).config
    widths, head = 3 * config.hidden_size + config.intermediate_size, config.hidden_size // config.num_attention_heads
    monkeypatch.setattr("planish.planning.estimate.seconds_per_launch", lambda _device: 1e6)
    for settings, rounded in (((), widths), (("solver.gptaq.attention=true",), widths + head * config.hidden_size), (("solver=rtn",), 0)):
        found = make_plan(quick("w4a4-best", "steps=[hadamard]", *settings), model, device=GPU).seconds
        assert found == pytest.approx(config.num_hidden_layers * 12e6 * rounded, rel=1e-3, abs=1e3)


@pretended
def test_keys_of_float32_are_repeated_for_their_queries(model: Path) -> None:
    """No fused attention of CUDA takes them as they are."""
    make_plan(quick("w8a8"), model, device=GPU)
    wide = torch.zeros(1, 1, 4, 8).to(GPU)
    assert [sdpa_attention.use_gqa_in_sdpa(None, keys, keys) for keys in (wide, wide.half(), wide.cpu())] == [False, True, True]
