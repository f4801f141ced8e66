"""The linear layer of packed weights: what QuantizedLinear computes, through the operators, in the memory that the codes need.

Drop-in: the same arguments, the same result but for rounding (it rounds once, where `QuantizedLinear` of bfloat16 rounds the integer
product, too). Weights lie as the device's kernels want them, so build it on the device where it runs.

On a CPU codes are kept one a byte, in tiles or as oneDNN wants them, those of 4 bits included; under torch.compile the quantization there is left to
the compiler, which fuses it with what comes before and after, unless it is one operator with the product. Weight-only layers are packed; with AVX-512
they are kept as torch's own int4 kernel for few tokens wants them besides, where their group has a size that it knows and their scales are exact in
bfloat16.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanishError
from ..formats import ActivationFormat, QuantizedWeight
from ..linear import Side, StaticGrid, quantize_input
from ..transforms.factors import Blocks, Chain, Hadamard, on_input
from . import cpu, tiles
from .nibbles import pack_nibbles

_TORCH_GROUPS = (32, 64, 128, 256)


class Placed(nn.Module):
    """A layer whose codes and scales stay what and where they are."""

    w_scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Placed":
        """Nothing: dtypes stay, for codes and scales are what they are. PlanishError: to another device, whose kernels want another layout."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self.w_scale[:0]).device
        if device != self.w_scale.device:
            raise PlanishError(
                f"to {device}: packed weights lie as the kernels of {self.w_scale.device} want them. "
                f"Load the model on {device} (device= of planish.load, device_map= of from_pretrained)."
            )
        return self


class WideLinear(nn.Linear):
    """A linear in full precision whose bfloat16 products are float32's, see cpu.linear: what a processor without such products runs."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I). Returns (..., O)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(input)
        return cpu.linear(input.reshape(-1, self.in_features), self.weight, self.bias).view(*input.shape[:-1], self.out_features)


class PackedLinear(Placed):
    """y = Q(x T) Ŵᵀ + b for x (..., I): see QuantizedLinear. Only for what `supports` says yes to."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        activations: ActivationFormat | None = None,
        static: StaticGrid | None = None,
        chain: Chain = (),
        dtype: torch.dtype = torch.float32,
        side: Side | None = None,
    ) -> None:
        super().__init__()
        assert self.supports(weight, activations, side)
        self.activations, self.static, self.chain, self.dtype = activations, static, chain, dtype
        self.out_features, self.in_features = weight.codes.shape
        self.low = None if side is None or side.low is None else side.low.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.tiles: Tensor | None = None
        self.norm: tuple[Tensor, float] | None = None
        if activations is None:
            self._weight_only(weight, dtype)
        else:
            self._integer(weight, activations)

    @property
    def tiled(self) -> bool:
        """Whether weights lie in tiles, and quantization and product are one operator."""
        return self.tiles is not None

    @property
    def takes_norm(self) -> bool:
        """Whether an RMSNorm of its input and the input's quantization can be one operator, see `behind`."""
        fmt = self.activations
        return fmt is not None and fmt.granularity == "token" and not self.chain and self.low is None and not self.tiled

    def behind(self, weight_C: Tensor, eps: float) -> "PackedLinear":
        """The same layer, whose input is x / sqrt(mean(x²) + eps) * weight_C, rounded as rms_norm_quantize rounds."""
        assert self.takes_norm
        normed = copy.copy(self)
        normed.norm = weight_C, eps
        return normed

    @staticmethod
    def supports(weight: QuantizedWeight, activations: ActivationFormat | None, side: Side | None = None) -> bool:
        """Whether the operators compute such a layer: weight-only of 4 bits; else integer codes on both sides, their scales per channel or tensor and
        per token or tensor, symmetric weights (or asymmetric of up to 7 bits); no channels kept out of the codes."""
        if (side is not None and side.kept is not None) or weight.format.type == "float":
            return False
        if activations is None:
            return weight.format.bits == 4 and weight.codes.shape[1] % 2 == 0
        zero_fits = weight.zero is None or weight.format.bits < 8
        return weight.scale.shape[1] == 1 and activations.granularity != "group" and zero_fits

    def _integer(self, weight: QuantizedWeight, activations: ActivationFormat) -> None:
        codes_OI = weight.codes if weight.zero is None else (weight.codes - weight.zero).to(torch.int8)
        even = codes_OI.shape[1] % 2 == 0
        packed = codes_OI.is_cuda and even and weight.zero is None and weight.format.bits <= 4
        self.packed_input = packed and activations.bits == 4 and activations.granularity == "token"
        self.op = torch.ops.planish.linear_w4a4 if self.packed_input else torch.ops.planish.linear_w4a8 if packed else torch.ops.planish.linear_w8a8
        self.w_scale = weight.scale.float().expand(self.out_features, 1).flatten().contiguous()
        self.w_sum = codes_OI.sum(1, dtype=torch.int32)
        if (
            codes_OI.device.type == "cpu"
            and self.dtype == torch.bfloat16
            and activations.granularity == "token"
            and self.low is None
            and tiles.engine()
        ):
            self.tiles, self.wide_bias = tiles.tiles(codes_OI), None if self.bias is None else self.bias.float()
        else:
            self.weight = pack_nibbles(codes_OI) if packed else codes_OI.contiguous() if codes_OI.is_cuda else _cpu_weight(codes_OI)

    def _weight_only(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        shape = (self.out_features, weight.scale.shape[1])
        self.weight = pack_nibbles(weight.codes)
        self.w_scale = weight.scale.float().expand(shape).contiguous()
        self.w_zero = None if weight.zero is None else weight.zero.float().expand(shape).contiguous()
        self.group = few_tokens_group(weight, dtype)
        if self.group is not None:
            codes_OI = (weight.codes + 8).to(torch.int32)
            self.few_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
            scale_GO = self.w_scale.T.repeat_interleave(self.in_features // self.group // shape[1], 0)
            self.few_grid = torch.stack([scale_GO, torch.zeros_like(scale_GO)], -1).to(dtype).contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """With the same weight, which nothing changes, and which torch cannot copy where it is oneDNN's."""
        weight = self.__dict__.get("weight")
        memo |= {} if weight is None else {id(weight): weight}
        copied = PackedLinear.__new__(PackedLinear)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O)."""
        x_TC = x.reshape(-1, self.in_features)
        y_TO: Tensor = self._float(x_TC) if self.activations is None else self._codes(x_TC, self.activations)
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    def _float(self, x_TC: Tensor) -> Tensor:
        x_TC = on_input(self.chain, x_TC)
        if self.group is not None and len(x_TC) <= cpu.FEW:
            y_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TC, self.few_weight, self.group, self.few_grid)
            y_TO = y_TO if self.bias is None else y_TO + self.bias
        else:
            y_TO = torch.ops.planish.linear_w4a16(x_TC, self.weight, self.w_scale, self.w_zero, self.bias)
        return y_TO if self.low is None else y_TO + self.low.on_input(x_TC)

    def tiles_operands(self) -> tuple[Any, ...]:
        """Of the operators of `tiles`, where `tiled`: the weight, and how its input is quantized."""
        fmt = self.activations
        assert fmt is not None
        return self.tiles, self.w_scale, self.w_sum, self.wide_bias, fmt.bits, fmt.symmetric, fmt.clip

    def _codes(self, x_TC: Tensor, fmt: ActivationFormat) -> Tensor:
        if self.tiled:
            y_TO: Tensor = torch.ops.planish.linear_tiles(on_input(self.chain, x_TC), *self.tiles_operands(), cpu.LEAST)
            return y_TO
        if torch.compiler.is_compiling() and x_TC.device.type == "cpu" and fmt.granularity == "token" and self.norm is None:
            return self._traced(on_input(self.chain, x_TC), fmt)
        if self.low is None:
            return self.product(self.codes(x_TC), x_TC.dtype)
        x_TC = on_input(self.chain, x_TC)
        return self.product(self._quantize(x_TC, fmt), x_TC.dtype, x_TC @ self.low.down_RC.T, self.low.up_OR)

    def codes(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_TC as the product wants it: transformed, then quantized; see `schemas`."""
        fmt, last = self.activations, self.chain[-1] if self.chain else None
        assert fmt is not None
        grid = (fmt.bits, fmt.symmetric, fmt.clip, self.packed_input)
        found: tuple[Tensor, Tensor, Tensor]
        if self.norm is not None:
            found = torch.ops.planish.rms_norm_quantize(x_TC, *self.norm, *grid)
        elif fmt.granularity == "token" and isinstance(last, Hadamard):
            found = torch.ops.planish.hadamard_quantize(on_input(self.chain[:-1], x_TC), last.signs_C, last.block, *grid)
        elif fmt.granularity == "token" and isinstance(last, Blocks):
            found = torch.ops.planish.blocks_quantize(on_input(self.chain[:-1], x_TC), last.matrix_KBB, *grid)
        else:
            found = self._quantize(on_input(self.chain, x_TC), fmt)
        return found

    def product(self, x: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, low_TR: Tensor | None = None, up_OR: Tensor | None = None) -> Tensor:
        """With an input that is quantized already, as an operator gives it: (T, O) in dtype."""
        codes, scale, zero = x
        x_zero = zero if len(zero) else None
        y_TO: Tensor = self.op(codes, scale, x_zero, self.weight, self.w_scale, self.w_sum, self.bias, low_TR, up_OR, dtype)
        return y_TO

    def _traced(self, x_TC: Tensor, fmt: ActivationFormat) -> Tensor:
        """The same on a CPU as operations that the compiler can fuse, all but the product."""
        codes, scale, zero = cpu.quantize_per_token(x_TC, fmt.bits, fmt.symmetric, fmt.clip, False)
        y_TO: Tensor = self.op(codes, None, None, self.weight, self.w_scale, None, None, None, None, torch.float32)
        if not fmt.symmetric:
            y_TO = y_TO - zero * (self.w_sum * self.w_scale)
        y_TO = y_TO * scale
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.to(x_TC.dtype) if self.low is None else (y_TO + self.low.on_input(x_TC)).to(x_TC.dtype)

    def _quantize(self, x_TC: Tensor, fmt: ActivationFormat) -> tuple[Tensor, Tensor, Tensor]:
        if fmt.granularity == "token":
            codes, scale, zero = torch.ops.planish.quantize_per_token(x_TC, fmt.bits, fmt.symmetric, fmt.clip, self.packed_input)
            return codes, scale, zero
        found = quantize_input(x_TC, fmt, self.static)
        return found.codes, found.scale, found.scale.new_empty((0, 1), dtype=torch.int32) if found.zero is None else found.zero.to(torch.int32)


def _cpu_weight(codes_OI: Tensor) -> Tensor:
    packed = cpu.prepack(codes_OI)
    return cpu.cpu_layout(codes_OI) if packed is None else packed


def few_tokens_group(weight: QuantizedWeight, dtype: torch.dtype) -> int | None:
    """The group size of torch's own int4 kernel on a CPU for this weight; None if that kernel cannot compute it as it is, in this dtype, or if
    planish's is as quick: by AVX2, where that needs no second copy of the weight."""
    inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
    fits = weight.codes.device.type == "cpu" and dtype == torch.bfloat16 and weight.zero is None and weight.codes.shape[0] % 16 == 0
    if not fits or (tiles.engine() == 1 and cpu.decodes(inputs, groups)):
        return None
    sizes = [size for size in _TORCH_GROUPS if (inputs // groups) % size == 0 and inputs % size == 0]
    return max(sizes, default=None) if torch.equal(weight.scale, weight.scale.bfloat16().float()) else None
