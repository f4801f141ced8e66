"""The linear layer as it will run: integer codes times integer codes, scales applied to the product.

This is what every measurement of planish executes, so that what was measured is what a server computes: activations are quantized per token,
per tensor or per group; per-channel and per-tensor weights multiply as integers (exact in bfloat16 and float32 alike, for a code has at most
9 bits), grouped ones are dequantized first, as the kernels of servers do. A side path runs beside the codes, on the input before it is quantized.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups, R channels that are kept out of the codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .formats import ActivationFormat, QuantizedWeight, activation_grid, by_group, to_codes
from .low_rank import LowRank
from .transforms.factors import Chain, on_input

_PIECE_VALUES = 1 << 18  # float32 values that are worked on at a time: what stays in the processor's cache is done several times faster


@dataclass(frozen=True, slots=True, eq=False)
class StaticGrid:
    """Scale and zero point of a static activation format, each (1, 1) float32; zero None if symmetric."""

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedInput:
    """An activation as integers: codes (T, C) int8, scale and zero (T, G) float32 (T or G may be 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def integers(self, dtype: torch.dtype) -> Tensor:
        """codes - zero: (T, C), exact in bfloat16 and wider."""
        if self.zero is None:
            return self.codes.to(dtype)
        zero = self.zero if self.zero.shape[1] == 1 else self.zero.repeat_interleave(self.codes.shape[1] // self.zero.shape[1], dim=1)
        return (self.codes.to(torch.int16) - zero.to(torch.int16)).to(dtype)

    def dequantize(self) -> Tensor:
        """(T, C) float32: (codes - zero) * scale."""
        x_TGC = by_group(self.integers(torch.float32), self.scale.shape[1])
        return x_TGC.mul_(self.scale[:, :, None]).flatten(1)


def quantize_input(x_TC: Tensor, fmt: ActivationFormat, static: StaticGrid | None = None) -> QuantizedInput:
    """x_TC as codes: with its own dynamic grid, or the given static one."""
    scale, zero = activation_grid(x_TC, fmt) if static is None else (static.scale, static.zero)
    codes_TC = torch.empty(x_TC.shape, dtype=torch.int8, device=x_TC.device)
    for rows in _pieces(*x_TC.shape):
        grid = rows if scale.shape[0] > 1 else slice(None)
        zero_TG1 = None if zero is None else zero[grid, :, None]
        codes_TC[rows] = to_codes(by_group(x_TC[rows], scale.shape[1]), scale[grid, :, None], zero_TG1, fmt.bits).flatten(1)
    return QuantizedInput(codes_TC, scale, zero)


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """All rows, in slices of about _PIECE_VALUES values."""
    size = max(1, _PIECE_VALUES // max(1, width))
    return (slice(start, start + size) for start in range(0, rows, size))


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The first R channels of an input, which the codes leave out: in full precision (QUAD), or in codes of more bits (ResQ).

    weight: their columns (O, R). activations: how their input is quantized, on a grid of its own; None: not.
    """

    weight: Tensor | QuantizedWeight
    activations: ActivationFormat | None = None

    @property
    def channels(self) -> int:
        """R."""
        return int((self.weight.codes if isinstance(self.weight, QuantizedWeight) else self.weight).shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What runs beside the codes, on the transformed input before it is quantized: a low-rank path, channels that are kept."""

    low: LowRank | None = None
    kept: Kept | None = None


def without_first(x_TC: Tensor, channels: int) -> Tensor:
    """x_TC with 0 in its first channels, which are kept elsewhere."""
    return nn.functional.pad(x_TC[:, channels:], (channels, 0)) if channels else x_TC


class QuantizedLinear(nn.Module):
    """y = Q(x T) Ŵᵀ + b, with x of any leading shape (..., I), result (..., O) in x's dtype.

    activations None: weight only. chain: T, what the input goes through first, also a smoothing scale under trial that no host has absorbed.
    side: what is added; the channels that it keeps are 0 in weight.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activations: ActivationFormat | None = None,
        static: StaticGrid | None = None,
        chain: Chain = (),
        dtype: torch.dtype = torch.float32,
        side: Side | None = None,
    ) -> None:
        super().__init__()
        self.activations, self.static, self.chain = activations, static, chain
        self.in_features, self.out_features = weight.codes.shape[1], weight.codes.shape[0]
        self.grouped = weight.scale.shape[1] > 1 or (activations is not None and activations.granularity == "group")
        self.factor = None if self.grouped or activations is None else weight.scale.reshape(1, -1)
        self.matrix = (weight.dequantize() if self.factor is None else weight.integers()).to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.low = None if side is None or side.low is None else side.low.to(dtype)
        kept = None if side is None else side.kept
        self.kept = 0 if kept is None else kept.channels
        self.high = None if kept is None else _high(kept, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O)."""
        x_TC = on_input(self.chain, x.reshape(-1, x.shape[-1]))
        if self.activations is None:
            y_TO = nn.functional.linear(x_TC, self.matrix, self.bias)
        else:
            quantized = quantize_input(without_first(x_TC, self.kept), self.activations, self.static)
            y_TO = self.multiply(quantized, self.left(quantized))
        return self.beside(x_TC, y_TO).reshape(*x.shape[:-1], self.out_features)

    def beside(self, x_TC: Tensor, y_TO: Tensor) -> Tensor:
        """y_TO and what the side path makes of the transformed input x_TC: (T, O)."""
        if self.low is not None:
            y_TO = y_TO + self.low.on_input(x_TC)
        if self.high is not None:
            y_TO = y_TO + self.high(x_TC[:, : self.kept])
        return y_TO

    def left(self, x: QuantizedInput) -> Tensor:
        """The left factor of the product: (T, I) in the layer's dtype. Readers of one input can share it."""
        return x.dequantize().to(self.matrix.dtype) if self.factor is None else x.integers(self.matrix.dtype)

    def multiply(self, x: QuantizedInput, left_TI: Tensor) -> Tensor:
        """The product with an input that is already quantized, left_TI = left(x): (T, O) in the layer's dtype."""
        if self.factor is None:
            return nn.functional.linear(left_TI, self.matrix, self.bias)
        y_TO = left_TI @ self.matrix.T
        for rows in _pieces(*y_TO.shape):
            exact_TO = y_TO[rows] * (x.scale[rows] if len(x.scale) > 1 else x.scale)
            exact_TO *= self.factor  # two small factors, one after the other: three times faster than their outer product
            if self.bias is not None:
                exact_TO += self.bias
            y_TO[rows] = exact_TO
        return y_TO


def _high(kept: Kept, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What the kept channels are multiplied by."""
    if isinstance(kept.weight, QuantizedWeight):
        return QuantizedLinear(kept.weight, None, kept.activations, dtype=dtype).forward  # no module of its own: it has no place in the model
    return partial(nn.functional.linear, weight=kept.weight.to(dtype))
