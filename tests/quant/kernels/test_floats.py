"""FloatLinear computes what QuantizedLinear does of 8-bit floats, and is taken where it can."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers_solvers import inputs, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, WeightFormat
from planish.quant.kernels import floats
from planish.quant.kernels.floats import FloatLinear, runs_floats
from planish.quant.linear import Parts, QuantizedLinear, Side
from planish.quant.low_rank import LowRank
from planish.quant.solvers import Rtn
from planish.quant.transforms.factors import Scale

cuda: Any = pytest.importorskip("planish.quant.kernels.cuda")  # needs Triton
TOKEN = ActivationFormat(bits=8, type="float")


def parts(
    out: int = 32,
    granularity: str = "channel",
    activations: ActivationFormat | None = TOKEN,
    dtype: torch.dtype = torch.float32,
    *,
    chain: bool = False,
    side: bool = False,
    kind: str = "float",
) -> Parts:
    fmt = WeightFormat(bits=8, type=kind, granularity=granularity)  # type: ignore[arg-type]
    weight = Rtn().solve(weights(out, 48).float(), fmt, None, torch.bfloat16).weight
    low = Side(low=LowRank(torch.zeros(1, 48), torch.zeros(out, 1))) if side else None
    return Parts(weight, torch.linspace(-1, 1, out), activations, None, (Scale(torch.ones(48)),) if chain else (), dtype, low)


@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (7, 48), (2, 3, 48)], ids=str)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(shape: tuple[int, ...], granularity: str, dtype: torch.dtype) -> None:
    layer = parts(granularity=granularity, dtype=dtype)
    x = inputs(max(1, shape[0] * 3), 48).to(dtype)[: torch.Size(shape[:-1]).numel()].reshape(shape)
    found, expected = FloatLinear(layer)(x), QuantizedLinear(*layer)(x)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    exact = QuantizedLinear(*layer._replace(dtype=torch.float32))(x.float())
    assert (found.float() - exact).norm() <= 1.5 * (expected.float() - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("bias", [None, torch.ones(32)], ids=["plain", "bias"])
def test_the_gpus_product_is_the_cpus_but_for_its_rounding(bias: Tensor | None) -> None:
    """torch's own kernel has a CPU implementation, too."""
    x, weight = inputs(7, 48).float(), weights(32, 48).float()
    (q_TC, s_T1), (k_OC, t_O1) = torch.ops.planish.quantize_fp8(x), torch.ops.planish.quantize_fp8(weight)
    expected = torch.ops.planish.linear_fp8(q_TC, s_T1, k_OC, t_O1.flatten(), bias, torch.float32)
    found = cuda.linear_fp8(q_TC, s_T1, k_OC, t_O1.flatten(), bias, torch.float32)
    assert (found - expected).norm() < 2**-8 * expected.norm()


@pytest.fixture
def on_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the weights were on such a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))


@pytest.mark.usefixtures("on_ada")
def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_floats(parts(dtype=torch.bfloat16))
    assert runs_floats(parts(dtype=torch.float16, granularity="tensor"))
    half = partial(parts, dtype=torch.bfloat16)
    others = {
        "float32": parts(),
        "integers": half(kind="int", activations=ActivationFormat(bits=8)),
        "no activations": half(activations=None),
        "static": half(activations=ActivationFormat(bits=8, type="float", granularity="tensor", dynamic=False)),
        "clipped": half(activations=ActivationFormat(bits=8, type="float", clip=0.9)),
        "odd widths": half(out=33),
        "transformed": half(chain=True),
        "a side path": half(side=True),
    }
    assert [name for name, layer in others.items() if runs_floats(layer)] == []
    monkeypatch.setattr(floats, "_CAPABILITY", (9, 0))
    assert not runs_floats(half())


def test_never_on_a_cpu_and_never_moved() -> None:
    assert not runs_floats(parts(dtype=torch.bfloat16))
    layer = FloatLinear(parts())
    assert layer.to(torch.float16).weight.dtype is torch.float8_e4m3fn
    with pytest.raises(PlanishError, match="to meta: packed weights lie as the kernels of cpu want them"):
        layer.to("meta")
