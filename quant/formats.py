"""Number formats: how weights and activations become codes, at which granularity, and back.

All integers are signed, as in compressed-tensors: b bits span [-2^(b-1), 2^(b-1) - 1]; an asymmetric format adds
an integer zero point in that range. A code q stands for (q - zero_point) * scale. Floats are always symmetric. Of 8 bits they are e4m3 (Micikevicius
et al., "FP8 Formats for Deep Learning", 2022, table 1; torch's float8_e4m3fn): 4 bits of exponent, 3 of mantissa, no infinity, up to 448. Of 4 bits
they are NVFP4 (NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, section 2): e2m1, which is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives, in groups of 16 whose scales are e4m3 numbers divided by a factor that a whole tensor shares.

Shape suffixes: O out channels, I in channels, G groups along I, T tokens, C channels.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .errors import PlanishError

WeightGranularity = Literal["tensor", "channel", "group"]
ActivationGranularity = Literal["tensor", "token", "group"]
NumberType = Literal["int", "float"]
Kind: TypeAlias = int | Literal["e4m3", "nvfp4"]
"""Of codes: so many bits of a signed integer, or a float's name."""
E4M3: Literal["e4m3"] = "e4m3"
NVFP4: Literal["nvfp4"] = "nvfp4"
NVFP4_GROUP = 16
_LARGEST = {E4M3: 448, NVFP4: 6}
LEAST_SCALE = 2.0**-24  # the smallest float16; of the wider types only normal numbers are scales


@dataclass(frozen=True, slots=True)
class Factored:
    """What scales of NVFP4 are rounded to: e4m3 numbers over a factor, a power of two where planish chooses it. So a scale times a code is exact in
    bfloat16, and all consumers multiply the same numbers, whether they scale before or after."""

    factor: float | Tensor

    @classmethod
    def reaching(cls, absmax: float) -> "Factored":
        """The largest power of two with which scales and codes reach twice absmax: solvers move weights, and other texts hold larger values."""
        if not absmax >= _LEAST_FITTED:
            return cls(1.0)
        return cls(2.0 ** (math.frexp(_LARGEST[NVFP4] * _LARGEST[E4M3] / (2 * absmax))[1] - 1))

    def numbers(self, scale: Tensor) -> Tensor:
        """Scales, already rounded, as they are stored: e4m3. PlanishError: some are no such numbers under this factor."""
        stored = (scale * self.factor).to(torch.float8_e4m3fn)
        if not torch.equal(stored.float() / self.factor, scale):
            raise PlanishError("scales of NVFP4 are to be e4m3 numbers over their common factor, and some are not. Please report the recipe.")
        return stored

    def rounded(self, scale: Tensor) -> Tensor:
        """Positive scales as they will be stored. One that rounds to 0 becomes so large that all codes under it are 0."""
        stored = (scale * self.factor).clamp(max=_LARGEST[E4M3]).to(torch.float8_e4m3fn).to(scale.dtype)
        return torch.where(stored == 0, _FLUSHED, stored) / self.factor


ScaleType: TypeAlias = torch.dtype | Factored
"""What the scales of a weight are rounded to."""
_LEAST_FITTED = 2.0**-100  # beyond, factors leave float32's range
_FLUSHED = 0.125  # e4m3's least number is 2^-9, so what rounds to 0 is less than 1/64 of this, and a code of 0 holds up to 1/4 of it


def _check_number(where: str, kind: NumberType, bits: int, symmetric: bool, granularity: str, group_size: int | None) -> None:
    if kind == "float" and (bits not in (4, 8) or not symmetric):
        raise PlanishError(f"{where}: a float of {bits} bits, symmetric {symmetric}. Floats have 8 bits (e4m3) or 4 (NVFP4), symmetric true.")
    if kind == "float" and bits == 8 and granularity == "group":
        raise PlanishError(f"{where}: fp8 with granularity group; no consumer runs it. Use {'channel' if where == 'weights' else 'token'}.")
    if kind == "float" and bits == 4 and (granularity, group_size) != ("group", NVFP4_GROUP):
        raise PlanishError(
            f"{where}: floats of 4 bits with granularity {granularity}, group_size {group_size}. They are NVFP4: set granularity group, "
            f"group_size {NVFP4_GROUP}."
        )
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
    """Format of a weight (O, I): one scale per tensor, per output channel, or per group of input channels. type float: e4m3, of 8 bits,
    or NVFP4, of 4 bits in groups of 16."""

    bits: int
    type: NumberType = "int"
    symmetric: bool = True
    granularity: WeightGranularity = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_number("weights", self.type, self.bits, self.symmetric, self.granularity, self.group_size)
        _check_group("weights", self.granularity, self.group_size)

    @property
    def kind(self) -> Kind:
        """Of its codes."""
        return _kind(self.type, self.bits)

    @property
    def name(self) -> str:
        """int4, fp8, nvfp4."""
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
    """Format of an activation (T, C): one scale per tensor, per token, or per group of channels of a token. type float: e4m3, of 8
    bits, or NVFP4, of 4 bits in groups of 16, which is scaled as its values come, but by a factor from calibration (`calibrated`).

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
        _check_number("activations", self.type, self.bits, self.symmetric, self.granularity, self.group_size)
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
        return _kind(self.type, self.bits)

    @property
    def name(self) -> str:
        """int8, fp8."""
        return _name(self.type, self.bits)

    @property
    def calibrated(self) -> bool:
        """Whether something of its scales is known before the tokens are: all (static), or the factor of NVFP4."""
        return not self.dynamic or self.kind == NVFP4


def _kind(number: NumberType, bits: int) -> Kind:
    return bits if number == "int" else E4M3 if bits == 8 else NVFP4


def _name(number: NumberType, bits: int) -> str:
    kind = _kind(number, bits)
    return f"int{bits}" if isinstance(kind, int) else "fp8" if kind == E4M3 else kind


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
        if self.activations is not None and self.weights is not None and self.weights.type == "float" and self.activations.kind != self.weights.kind:
            raise PlanishError(
                f"scheme: {self.weights.name} weights, {self.activations.name} activations; no consumer multiplies these. Use one of them."
            )


def code_range(kind: Kind) -> tuple[int, int]:
    """Smallest and largest code."""
    if isinstance(kind, str):
        return -_LARGEST[kind], _LARGEST[kind]
    return -(1 << (kind - 1)), (1 << (kind - 1)) - 1


def code_dtype(kind: Kind) -> torch.dtype:
    """In what weights' codes are kept: those of NVFP4 are among e4m3's."""
    return torch.int8 if isinstance(kind, int) else torch.float8_e4m3fn


def nearest(x: Tensor, kind: Kind) -> Tensor:
    """The nearest code of every number, of two the even one, in x's dtype; x itself may be what is changed."""
    if kind == E4M3:
        return x.clamp(*code_range(kind)).to(code_dtype(kind)).to(x.dtype)
    if kind == NVFP4:
        x = x.clamp_(*code_range(kind))
        size = x.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
        return x.div_(step).round_().mul_(step)
    return x.round_().clamp_(*code_range(kind))


def scale_and_zero(low: Tensor, high: Tensor, kind: Kind, symmetric: bool, dtype: ScaleType | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover [low, high]; 0 is always representable.

    low, high: any equal shape. Symmetric: scale = max(|low|, |high|) / the largest code, such as 2^(b-1) - 1, zero point None. Asymmetric: scale =
    (high - low) / (2^b - 1), zero point = round(qmin - low / scale). dtype: the scale is first rounded to what will be stored; of NVFP4 by a factor
    that fits all of these ranges, unless one is given. A range of width 0 gets scale 1, of NVFP4 one that makes all codes 0.
    """
    qmin, qmax = code_range(kind)
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    if kind == NVFP4:
        stored = dtype if isinstance(dtype, Factored) else Factored.reaching(qmax * float(width.amax()) if width.numel() else 0.0)
        return width + (stored.rounded(width.detach()) - width.detach()) if width.requires_grad else stored.rounded(width), None
    assert not isinstance(dtype, Factored)
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
    """A weight as codes: (O, I) int8, or float8_e4m3fn. scale: (O, G) float32 whose values are exact in what is stored.

    zero: (O, G) float32 integers, or None if symmetric. Per tensor formats have O and G of 1 in scale and zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: WeightFormat

    def rows(self, some: slice | Tensor) -> "QuantizedWeight":
        """Some output channels of it, by their numbers a copy."""
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


def fitted(w_OI: Tensor, fmt: WeightFormat, scale_type: ScaleType) -> ScaleType:
    """What the scales of a weight are rounded to: of NVFP4 e4m3 numbers over a factor that reaches its largest value; all others as given."""
    if fmt.kind != NVFP4 or isinstance(scale_type, Factored):
        return scale_type
    return Factored.reaching(float(w_OI.abs().amax()))


def activation_grid(x_TC: Tensor, fmt: ActivationFormat, stored: Factored | None = None) -> tuple[Tensor, Tensor | None]:
    """Dynamic scale and zero point of x_TC: (T, 1) per token, (1, 1) per tensor, (T, C / group) per group.

    They cover clip * min to clip * max. stored: of NVFP4 what scales are rounded to; None: by a factor that fits x_TC.
    """
    if fmt.granularity == "tensor":
        low, high = x_TC.amin().reshape(1, 1), x_TC.amax().reshape(1, 1)
    else:
        size = fmt.group_size or x_TC.shape[1]
        if x_TC.shape[1] % size:
            raise PlanishError(f"activations.group_size {size} does not divide {x_TC.shape[1]} channels.")
        x_TGC = by_group(x_TC, x_TC.shape[1] // size)
        low, high = x_TGC.amin(2), x_TGC.amax(2)  # two reductions: several times faster than aminmax along a dimension
    return scale_and_zero(low.float() * fmt.clip, high.float() * fmt.clip, fmt.kind, fmt.symmetric, stored)
