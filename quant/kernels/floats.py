"""The linear layer of 8-bit floats: what QuantizedLinear computes of them, through `quantize_fp8` and `linear_fp8`.

For GPUs that multiply such floats. On a CPU the reference is quicker: there the operators are for tests.

Shape suffixes: T tokens, C = I in channels, O out channels.
"""

import torch
from torch import Tensor

from ..linear import Parts
from .modules import Placed

_WIDTHS = 16  # torch's kernel takes multiples of it
_CAPABILITY = (8, 9)


def runs_floats(parts: Parts) -> bool:
    """Whether the layer is one of floats on both sides, scaled per token and per channel or tensor, in 16 bits, for the product is rounded to
    bfloat16, and its device multiplies them."""
    weight, act = parts.weight, parts.activations
    if weight.format.type != "float" or act is None or not act.dynamic or act.granularity != "token" or act.clip != 1:
        return False
    beside = bool(parts.chain) or parts.side is not None
    fits = parts.dtype in (torch.bfloat16, torch.float16) and not any(width % _WIDTHS for width in weight.codes.shape)
    return fits and not beside and weight.codes.is_cuda and torch.cuda.get_device_capability(weight.codes.device) >= _CAPABILITY


class FloatLinear(Placed):
    """y = Q(x) Ŵᵀ + b for x (..., I), with codes of one byte. The arguments are those of QuantizedLinear; see `runs_floats`."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.out_features, self.in_features = parts.weight.codes.shape
        self.weight, self.dtype = parts.weight.codes.contiguous(), parts.dtype
        self.w_scale = parts.weight.scale.float().expand(self.out_features, 1).flatten().contiguous()
        self.bias = None if parts.bias is None else parts.bias.to(parts.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O)."""
        codes_TC, scale_T1 = torch.ops.planish.quantize_fp8(x.reshape(-1, self.in_features))
        y_TO: Tensor = torch.ops.planish.linear_fp8(codes_TC, scale_T1, self.weight, self.w_scale, self.bias, self.dtype)
        return y_TO.reshape(*x.shape[:-1], self.out_features)
