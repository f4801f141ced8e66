"""planish.load on packed kernels: what the reference computes, but for rounding, on as many layers as the operators know."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers_compress import distance, ids, outlying, quick
from torch import nn

import planish
from planish.calib.packed import kernels_used
from planish.quant.errors import PlanishError

LAYERS, BLOCKS = 7, 3
TOGETHER = 5  # q, k, v; gate, up
CASES = {
    "w8a8": (LAYERS, TOGETHER),
    "w8a8-static": (LAYERS, TOGETHER),
    "w4a8": (LAYERS, TOGETHER),
    "w4a16-channel": (0, 0),  # on a CPU it takes torch's kernel for few tokens, which is for bfloat16
    "w4a4-fast": (LAYERS, TOGETHER),  # a prefix, chains before the inputs
    "paper-quarot": (LAYERS, TOGETHER),
    "low_rank: {rank: 8}": (LAYERS, 0),  # a path of each layer's own
    "resq: {}": (0, 0),  # channels beside the codes: not what the operators compute
}


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outlying(tmp_path_factory.mktemp("packed") / "model")


def compressed(recipe: str, model: Path, out: Path) -> Path:
    planish.compress(quick("w4a8", f"steps=[{{{recipe}}}]") if ": " in recipe else quick(recipe), model, out)
    return out


def kernels_of(model: nn.Module) -> dict[str, int]:
    """How many quantized linears run packed, how many of these as part of a product of several, and how many as they were measured."""
    kinds = Counter(kind for kind in kernels_used(model).values() if kind.startswith(("packed", "reference")))
    together = sum(count for kind, count in kinds.items() if kind.startswith("packed, one product"))
    return {"packed": together + kinds["packed"], "together": together, "reference": kinds["reference"]}


@torch.no_grad()
@pytest.mark.parametrize("recipe", CASES)
def test_as_the_reference(recipe: str, rough: Path, tmp_path: Path) -> None:
    out = compressed(recipe, rough, tmp_path / "out")
    reference, packed = (planish.load(out, kernels=kernels, dtype=torch.float32) for kernels in ("reference", "packed"))
    found = kernels_of(packed)
    together = found["together"] // BLOCKS
    assert (found["packed"] // BLOCKS, together) == CASES[recipe]
    assert found["packed"] + found["reference"] == BLOCKS * LAYERS
    assert kernels_of(reference) == {"packed": 0, "together": 0, "reference": BLOCKS * LAYERS}
    expected = reference(ids()).logits
    assert distance(packed(ids()).logits, expected) < 5e-3  # a code that last bits moved
    assert torch.equal(packed(ids()).logits, packed(ids()).logits)
    written = [model.generate(ids(1, 8), max_new_tokens=6, do_sample=False) for model in (reference, packed)]
    assert torch.equal(*written)
    noise, found_noise = (distance(planish.load(out, kernels=kernels)(ids()).logits.float(), expected) for kernels in ("reference", "packed"))
    assert found_noise < 1.3 * noise + 0.02  # in bfloat16 both round


@torch.no_grad()
def test_the_heads_product_is_one_matrix(rough: Path, tmp_path: Path) -> None:
    """The last token's slice of several samples, and all tokens: the logits are those of every token's product."""
    model = planish.load(compressed("w8a8", rough, tmp_path / "out"), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    every, last = model(ids()).logits, model(ids(), logits_to_keep=1).logits
    torch.testing.assert_close(last[:, 0], every[:, -1], rtol=1e-4, atol=1e-4)
    assert seen[1].stride(0) == seen[1].shape[1] * seen[1].stride(1)


def test_unknown_kernels(rough: Path) -> None:
    with pytest.raises(PlanishError, match=r"kernels is 'quick'\. Give one of auto, packed, compiled, reference"):
        planish.load(rough, kernels="quick")  # type: ignore[arg-type]


def test_an_ordinary_checkpoint_has_nothing_to_pack(rough: Path) -> None:
    model = planish.load(rough, kernels="packed")
    assert kernels_of(model) == {"packed": 0, "together": 0, "reference": 0}
    assert any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-fast"])
def test_compiled(recipe: str, rough: Path, tmp_path: Path) -> None:
    out = compressed(recipe, rough, tmp_path / "out")
    reference, compiled = (planish.load(out, kernels=kernels, dtype=torch.float32) for kernels in ("reference", "compiled"))
    for shape in ((2, 24), (1, 17), (3, 9)):
        assert distance(compiled(ids(*shape), use_cache=False).logits, reference(ids(*shape)).logits) < 5e-3
    written = [model.generate(ids(1, 8), max_new_tokens=6, do_sample=False) for model in (reference, compiled)]
    assert torch.equal(*written)
