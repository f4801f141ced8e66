"""Number formats: how weights and activations become codes, at which granularity, and back.

All integers are signed, as in compressed-tensors: b bits span [-2^(b-1), 2^(b-1) - 1]; an asymmetric format adds
an integer zero point in that range. A code q stands for (q - zero_point) * scale. Floats are e4m3 (Micikevicius et al., "FP8 Formats for
Deep Learning", 2022, table 1; torch's float8_e4m3fn): 4 bits of exponent, 3 of mantissa, no infinity, up to 448. They are always symmetric.

Shape suffixes: O out channels, I in channels, G groups along I, T tokens, C channels.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .errors import PlanishError

WeightGranularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["tensor", "token", "group"]
NumberType = Literal["int", "float"]
Kind: TypeAlias = int | Literal["e4m3"]
"""Of codes: so many bits of a signed integer, or a float's name."""
E4M3: Literal["e4m3"] = "e4m3"
LEAST_SCALE = 2.0**-24  # the smallest float16; of the wider types only normal numbers are scales


def _check_number(where: str, kind: NumberType, bits: int, symmetric: bool, granularity: str) -> None:
    if kind == "float" and (bits, symmetric) != (8, True):
        raise PlanishError(f"{where}: a float of {bits} bits, symmetric {symmetric}. Floats are e4m3: 8 bits, symmetric true.")
    if kind == "float" and granularity == "group":
        raise PlanishError(f"{where}: floats with granularity group; no consumer runs them. Use {'channel' if where == 'weights' else 'token'}.")
    if not 2 <= bits <= 8:
        raise PlanishError(f"{where}.bits is {bits}, but integer formats have 2 to 8 bits. Choose 4 or 8.")


def _check_group(where: str, granularity: str, group_size: int | None) -> None:
    if (granularity == "group") != (group_size is not None):
        raise PlanishError(
            f"{where}: granularity {granularity} with group_size {group_size}. group_size goes with granularity group, and only with it."
        )
    if group_size is not None and group_size < 2:
        raise PlanishError(f"{where}.group_size is {group_size}, but a group has at least 2 channels.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Format of a weight (O, I): one scale per tensor, per output channel, or per group of input channels. type float: e4m3, of 8 bits."""

    bits: int
    type: NumberType = "int"
    symmetric: bool = True
    granularity: WeightGranularity = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_number("weights", self.type, self.bits, self.symmetric, self.granularity)
        _check_group("weights", self.granularity, self.group_size)

    @property
    def kind(self) -> Kind:
        """Of its codes."""
        return E4M3 if self.type == "float" else self.bits

    @property
    def name(self) -> str:
        """int4, fp8."""
        return _name(self.type, self.bits)

    def groups(self, in_channels: int) -> int:
        """Number of scales along the input, 1 unless grouped."""
        if self.group_size is None:
            return 1
        if in_channels % self.group_size:
            raise PlanishError(
                f"weights.group_size {self.group_size} does not divide {in_channels} input channels. Use a divisor, or granularity channel."
            )
        return in_channels // self.group_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationFormat:
    """Format of an activation (T, C): one scale per tensor, per token, or per group of channels of a token. type float: e4m3, of 8 bits.

    clip: the part of each dynamic range that the grid covers; what lies beyond gets its last code.
    """

    bits: int
    type: NumberType = "int"
    symmetric: bool = True
    granularity: ActivationGranularity = "token"
    group_size: int | None = None
    dynamic: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        _check_number("activations", self.type, self.bits, self.symmetric, self.granularity)
        _check_group("activations", self.granularity, self.group_size)
        if not self.dynamic and self.granularity != "tensor":
            raise PlanishError(
                f"activations: static with granularity {self.granularity}. A static scale is known before the tokens are, "
                "so it is per tensor: set granularity tensor, or dynamic true."
            )
        if not 0 < self.clip <= 1:
            raise PlanishError(f"activations.clip is {self.clip}, but it is the part of the range to cover, above 0 and at most 1. Use 1.")
        if not self.dynamic and self.clip != 1:
            raise PlanishError(
                f"activations: static with clip {self.clip}. A static range is whatever calibration found: remove clip, or set dynamic true."
            )

    @property
    def kind(self) -> Kind:
        """Of its codes."""
        return E4M3 if self.type == "float" else self.bits

    @property
    def name(self) -> str:
        """int8, fp8."""
        return _name(self.type, self.bits)


def _name(kind: NumberType, bits: int) -> str:
    return f"{'fp' if kind == 'float' else 'int'}{bits}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """What is quantized at a site, and how. None: left in full precision."""

    weights: WeightFormat | None = None
    activations: ActivationFormat | None = None

    def __post_init__(self) -> None:
        if self.activations is not None and self.weights is None:
            raise PlanishError("scheme: activations are quantized but weights are not; no consumer runs this. Add scheme.weights.")
        if self.activations is not None and self.weights is not None and self.activations.type != self.weights.type:
            raise PlanishError(
                f"scheme: weights are of type {self.weights.type}, activations of type {self.activations.type}; planish multiplies like with like. "
                "Give both the same type."
            )


def code_range(kind: Kind) -> tuple[int, int]:
    """Smallest and largest code."""
    if kind == E4M3:
        return -448, 448
    return -(1 << (kind - 1)), (1 << (kind - 1)) - 1


def code_dtype(kind: Kind) -> torch.dtype:
    """In what weights' codes are kept."""
    return torch.float8_e4m3fn if kind == E4M3 else torch.int8


def nearest(x: Tensor, kind: Kind) -> Tensor:
    """The nearest code of every number, of two the even one, in x's dtype; x itself may be what is changed."""
    if kind == E4M3:
        return x.clamp(*code_range(kind)).to(code_dtype(kind)).to(x.dtype)
    return x.round_().clamp_(*code_range(kind))


def scale_and_zero(low: Tensor, high: Tensor, kind: Kind, symmetric: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover [low, high]; 0 is always representable.

    low, high: any equal shape. Symmetric: scale = max(|low|, |high|) / the largest code, such as 2^(b-1) - 1, zero point None. Asymmetric: scale =
    (high - low) / (2^b - 1), zero point = round(qmin - low / scale). dtype: the scale is first rounded to what will be stored. A range of width 0
    gets scale 1.
    """
    qmin, qmax = code_range(kind)
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    scale = width if dtype is None else width.to(dtype).to(width.dtype)
    least = min(torch.finfo(dtype or width.dtype).tiny, LEAST_SCALE)
    scale = torch.where(scale < least, torch.ones_like(scale), scale)
    if symmetric:
        return scale, None
    return scale, (qmin - low / scale).round_().clamp_(qmin, qmax)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor | None, kind: Kind) -> Tensor:
    """Codes of x, in x's dtype: clamp(round(x / scale + zero)). Scale and zero broadcast against x."""
    codes = x / scale
    if zero is not None:
        codes += zero
    return nearest(codes, kind)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as codes: (O, I) int8, or float8_e4m3fn. scale: (O, G) float32 whose values are exact in the stored dtype.

    zero: (O, G) float32 integers, or None if symmetric. Per tensor formats have O and G of 1 in scale and zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: WeightFormat

    def rows(self, some: slice) -> "QuantizedWeight":
        """Some output channels of it."""
        grid = some if len(self.scale) > 1 else slice(None)
        return QuantizedWeight(self.codes[some], self.scale[grid], None if self.zero is None else self.zero[grid], self.format)

    def integers(self) -> Tensor:
        """codes - zero: (O, I) float32."""
        q_OI = self.codes.float()
        if self.zero is None:
            return q_OI
        return (by_group(q_OI, self.scale.shape[1]) - self.zero[:, :, None]).flatten(1)

    def dequantize(self) -> Tensor:
        """(O, I) float32: (codes - zero) * scale."""
        q_OI = self.integers()
        q_OGI = by_group(q_OI, self.scale.shape[1])
        return (q_OGI * self.scale[:, :, None]).flatten(1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """x: (N, C) as (N, groups, C / groups), a view where it can be one."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups)


def weight_range(w_OI: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight under each scale: (O, G), or (1, 1) per tensor."""
    if fmt.granularity == "tensor":
        return w_OI.amin().reshape(1, 1), w_OI.amax().reshape(1, 1)
    w_OGI = by_group(w_OI, fmt.groups(w_OI.shape[1]))
    return w_OGI.amin(2), w_OGI.amax(2)


def activation_grid(x_TC: Tensor, fmt: ActivationFormat) -> tuple[Tensor, Tensor | None]:
    """Dynamic scale and zero point of x_TC: (T, 1) per token, (1, 1) per tensor, (T, C / group) per group.

    They cover clip * min to clip * max.
    """
    if fmt.granularity == "tensor":
        low, high = x_TC.amin().reshape(1, 1), x_TC.amax().reshape(1, 1)
    else:
        size = fmt.group_size or x_TC.shape[1]
        if x_TC.shape[1] % size:
            raise PlanishError(f"activations.group_size {size} does not divide {x_TC.shape[1]} channels.")
        x_TGC = by_group(x_TC, x_TC.shape[1] // size)
        low, high = x_TGC.amin(2), x_TGC.amax(2)  # two reductions: several times faster than aminmax along a dimension
    return scale_and_zero(low.float() * fmt.clip, high.float() * fmt.clip, fmt.kind, fmt.symmetric)
