"""The linear layer as it will run: integer codes times integer codes, scales applied to the product.

This is what every measurement of planish executes, so that what was measured is what a server computes: activations are quantized per token,
per tensor or per group; per-channel and per-tensor weights multiply as codes (exact in bfloat16 and float32 alike, for a code has at most
9 bits), grouped ones are dequantized first, as the kernels of servers do. A side path runs beside the codes, on the input before it is quantized.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups, R channels that are kept out of the codes.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .formats import ActivationFormat, Factored, QuantizedWeight, activation_grid, by_group, to_codes
from .low_rank import LowRank
from .pieces import pieces
from .transforms.factors import Chain, on_input, restore, store


@dataclass(frozen=True, slots=True, eq=False)
class StaticGrid:
    """Scale and zero point of a static activation format, each (1, 1) float32; zero None if symmetric. Of NVFP4, whose scales are dynamic, scale is 1
    over the factor that they share."""

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedInput:
    """An activation as codes: (T, C) int8, or bfloat16 with a float's values; scale and zero (T, G) float32 (T or G may be 1)."""

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
    """x_TC as codes: with its own dynamic grid, or the given static one; of NVFP4 with dynamic scales by the given factor."""
    if static is None or fmt.dynamic:
        scale, zero = activation_grid(x_TC, fmt, None if static is None else Factored(static.scale.reciprocal()))
    else:
        scale, zero = static.scale, static.zero
    codes_TC = torch.empty(x_TC.shape, dtype=torch.int8 if isinstance(fmt.kind, int) else torch.bfloat16, device=x_TC.device)
    for rows in pieces(x_TC):
        grid = rows if scale.shape[0] > 1 else slice(None)
        zero_TG1 = None if zero is None else zero[grid, :, None]
        codes_TC[rows] = to_codes(by_group(x_TC[rows], scale.shape[1]), scale[grid, :, None], zero_TG1, fmt.kind).flatten(1)
    return QuantizedInput(codes_TC, scale, zero)


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

    def rows(self, index_N: Tensor) -> "Kept":
        """Their part in these of the outputs: a copy."""
        weight = self.weight.rows(index_N) if isinstance(self.weight, QuantizedWeight) else self.weight[index_N]
        return Kept(weight, self.activations)


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What runs beside the codes, on the transformed input before it is quantized: a low-rank path, channels that are kept."""

    low: LowRank | None = None
    kept: Kept | None = None

    def rows(self, index_N: Tensor) -> "Side":
        """What runs beside these of the outputs: copies."""
        low = None if self.low is None else LowRank(self.low.down_RC, self.low.up_OR[index_N])
        return Side(low, None if self.kept is None else self.kept.rows(index_N))


def without_first(x_TC: Tensor, channels: int) -> Tensor:
    """x_TC with 0 in its first channels, which are kept elsewhere."""
    return nn.functional.pad(x_TC[:, channels:], (channels, 0)) if channels else x_TC


class Parts(NamedTuple):
    """What a quantized linear is made of, in the order of QuantizedLinear's arguments."""

    weight: QuantizedWeight
    bias: Tensor | None
    activations: ActivationFormat | None
    static: StaticGrid | None
    chain: Chain
    dtype: torch.dtype
    side: Side | None

    def rows(self, index_N: Tensor) -> "Parts":
        """What makes these of the outputs, N of the linear's O, as the whole linear would: copies, so that the whole one can go."""
        side = None if self.side is None else self.side.rows(index_N)
        return self._replace(weight=self.weight.rows(index_N), bias=None if self.bias is None else self.bias[index_N], side=side)


def _of_codes(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 else dtype


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
        # Sums of integer codes are beyond float16's range: their products are those of bfloat16, which holds codes exactly.
        self.matrix = weight.dequantize().to(dtype) if self.factor is None else weight.integers().to(_of_codes(dtype))
        self.dtype = dtype
        self.bias = None if bias is None else bias.to(dtype)
        self.low = None if side is None or side.low is None else side.low.to(dtype)
        kept = None if side is None else side.kept
        self.kept = 0 if kept is None else kept.channels
        self.channels, self.high = kept, None if kept is None else _high(kept, dtype)
        self.shared: SharedInput | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O)."""
        x_TC, quantized, left_TI = self.prepare(x) if self.shared is None else self.shared.of(x, self)
        y_TO = nn.functional.linear(x_TC, self.matrix, self.bias) if quantized is None else self.multiply(quantized, left_TI)
        return self.beside(x_TC, y_TO).reshape(*x.shape[:-1], self.out_features)

    def prepare(self, x: Tensor) -> "Prepared":
        """What is made of x (..., I) before it is multiplied."""
        x_TC = on_input(self.chain, x.reshape(-1, x.shape[-1]))
        if self.activations is None:
            return x_TC, None, x_TC
        quantized = quantize_input(without_first(x_TC, self.kept), self.activations, self.static)
        return x_TC, quantized, self.left(quantized)

    def prepares_like(self, other: "QuantizedLinear") -> bool:
        """Whether another reader of the same site, with the same chain, can take what this one prepares."""
        how = [(layer.activations, layer.kept, layer.factor is None, layer.dtype) for layer in (self, other)]
        grids = [[] if layer.static is None else [layer.static.scale, layer.static.zero] for layer in (self, other)]
        same = all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in zip(*grids, strict=False))
        return how[0] == how[1] and len(grids[0]) == len(grids[1]) and same

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Moves to another device. dtypes stay: codes and scales are what they are, and an input of another dtype is an error."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self.matrix[:0]).device
        if device != self.matrix.device:
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        self.matrix = self.matrix.to(device)
        self.factor = None if self.factor is None else self.factor.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)
        if self.static is not None:
            self.static = StaticGrid(self.static.scale.to(device), None if self.static.zero is None else self.static.zero.to(device))
        described, tensors = store(self.chain)
        self.chain = restore(described, {name: tensor.to(device) for name, tensor in tensors.items()})
        self.low = None if self.low is None else LowRank(self.low.down_RC.to(device), self.low.up_OR.to(device))
        if self.channels is not None:
            self.channels = _moved(self.channels, device)
            self.high = _high(self.channels, self.dtype)

    def beside(self, x_TC: Tensor, y_TO: Tensor) -> Tensor:
        """y_TO and what the side path makes of the transformed input x_TC: (T, O)."""
        if self.low is not None:
            y_TO = y_TO + self.low.on_input(x_TC)
        if self.high is not None:
            y_TO = y_TO + self.high(x_TC[:, : self.kept])
        return y_TO

    def left(self, x: QuantizedInput) -> Tensor:
        """The left factor of the product: (T, I) in the matrix's dtype. Readers of one input can share it."""
        return x.dequantize().to(self.matrix.dtype) if self.factor is None else x.integers(self.matrix.dtype)

    def multiply(self, x: QuantizedInput, left_TI: Tensor) -> Tensor:
        """The product with an input that is already quantized, left_TI = left(x): (T, O) in the layer's dtype."""
        if self.factor is None:
            return nn.functional.linear(left_TI, self.matrix, self.bias)
        sums_TO = left_TI @ self.matrix.T
        y_TO = sums_TO if sums_TO.dtype == self.dtype else torch.empty_like(sums_TO, dtype=self.dtype)
        for rows in pieces(sums_TO):
            exact_TO = sums_TO[rows] * (x.scale[rows] if len(x.scale) > 1 else x.scale)
            exact_TO *= self.factor  # two small factors, one after the other: three times faster than their outer product
            if self.bias is not None:
                exact_TO += self.bias
            y_TO[rows] = exact_TO
        return y_TO


Prepared = tuple[Tensor, QuantizedInput | None, Tensor]
"""An input of a layer, ready to be multiplied: transformed (T, I); its codes, None if it has none; the left factor of the product (T, I)."""


class SharedInput:
    """What the readers of one site make of one input: made for the first of them, and let go when the last has had it."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._made: tuple[weakref.ref[Tensor], int, Prepared] | None = None
        self._left = 0

    def of(self, x: Tensor, reader: QuantizedLinear) -> Prepared:
        """x (..., I) as `reader` prepares it. The same x is the same object, unchanged since."""
        if torch.compiler.is_compiling():
            return reader.prepare(x)
        made, version = self._made, 0 if x.is_inference() else x._version
        if made is not None and made[0]() is x and made[1] == version:
            self._left -= 1
            if self._left <= 0:
                self._made = None
            return made[2]
        prepared = reader.prepare(x)
        self._made, self._left = (weakref.ref(x), version, prepared), self.readers - 1
        return prepared

    def __getstate__(self) -> dict[str, object]:
        """For copies: without the input at hand."""
        return {"readers": self.readers, "_made": None, "_left": 0}


def share_input(readers: Sequence[QuantizedLinear]) -> None:
    """Let the readers of one site, whose chain is the same, prepare each input once, where all prepare it alike. Each computes what it did."""
    if len(readers) > 1 and all(readers[0].prepares_like(reader) for reader in readers[1:]):
        shared = SharedInput(len(readers))
        for reader in readers:
            reader.shared = shared


def _moved(kept: Kept, device: torch.device) -> Kept:
    weight = kept.weight
    if isinstance(weight, QuantizedWeight):
        zero = None if weight.zero is None else weight.zero.to(device)
        return Kept(QuantizedWeight(weight.codes.to(device), weight.scale.to(device), zero, weight.format), kept.activations)
    return Kept(weight.to(device), kept.activations)


def _high(kept: Kept, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What the kept channels are multiplied by."""
    if isinstance(kept.weight, QuantizedWeight):
        return QuantizedLinear(kept.weight, None, kept.activations, dtype=dtype).forward  # no module of its own: it has no place in the model
    return partial(nn.functional.linear, weight=kept.weight.to(dtype))
