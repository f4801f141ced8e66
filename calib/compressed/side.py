"""Side paths in a checkpoint: tensors `{linear}.planish.down`, `up` (low rank), `kept`, `kept_scale` (channels that the codes leave out).

Shape suffixes: O out channels, C in channels, R rank of a path, or channels kept.
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from ...quant.formats import ActivationFormat, QuantizedWeight, Scheme, WeightFormat
from ...quant.linear import Kept, Side
from ...quant.low_rank import LowRank
from .extension import SiteInput

LOCAL = ("down", "up", "kept", "kept_scale")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Expected = tuple[tuple[torch.dtype, ...], tuple[int, ...]]
"""Possible dtypes, and the shape, of a tensor."""


def side_name(linear: str, local: str) -> str:
    """The full name of a side path's tensor."""
    return f"{linear}.planish.{local}"


def side_names(linear: str, tensors: Container[str]) -> dict[str, str]:
    """The full names of those that there are among tensors, by local name."""
    return {local: name for local in LOCAL if (name := side_name(linear, local)) in tensors}


def kept_formats(bits: int, scheme: Scheme) -> tuple[WeightFormat, ActivationFormat | None]:
    """How kept channels of so many bits are quantized beside a scheme: weights per channel, the input per token if the scheme quantizes it."""
    act = scheme.activations
    return WeightFormat(bits=bits), None if act is None else ActivationFormat(bits=bits, symmetric=act.symmetric)


def expected_tensors(what: SiteInput, path: str, out_channels: int, channels: int) -> dict[str, Expected]:
    """The tensors of the reader at `path`, (out_channels, channels), by local name; empty where it has no side path."""
    expected: dict[str, Expected] = {}
    if rank := what.ranks.get(path):
        expected |= {"down": (FLOATS, (rank, channels)), "up": (FLOATS, (out_channels, rank))}
    if what.kept:
        expected["kept"] = (FLOATS if what.kept_bits is None else (torch.int8,), (out_channels, what.kept))
    if what.kept and what.kept_bits is not None:
        expected["kept_scale"] = (FLOATS, (out_channels, 1))
    return expected


def side_tensors(side: Side, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds of it, by local name; numbers that are no codes in dtype."""
    tensors: dict[str, Tensor] = {}
    if side.low is not None:
        tensors |= {"down": side.low.down_RC.to(dtype), "up": side.low.up_OR.to(dtype)}
    if side.kept is not None:
        weight = side.kept.weight
        if isinstance(weight, QuantizedWeight):
            tensors |= {"kept": weight.codes, "kept_scale": weight.scale.to(dtype)}
        else:
            tensors["kept"] = weight.to(dtype)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def restored_side(tensors: Mapping[str, Tensor], what: SiteInput, scheme: Scheme) -> Side | None:
    """What `side_tensors` made, float32. tensors: by local name; scheme: of the site. None where there are none."""
    if not tensors:
        return None
    low = LowRank(tensors["down"].float(), tensors["up"].float()) if "down" in tensors else None
    if "kept" not in tensors:
        return Side(low)
    if what.kept_bits is None:
        return Side(low, Kept(tensors["kept"].float()))
    fmt, act = kept_formats(what.kept_bits, scheme)
    return Side(low, Kept(QuantizedWeight(tensors["kept"], tensors["kept_scale"].float(), None, fmt), act))
