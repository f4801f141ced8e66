"""Attention of bfloat16 in one pass on CPUs with AVX512-BF16, several times as fast there as torch's (attention.h).

Shape suffixes: B batches, H query heads, G key-value heads, T queries, S keys, D channels of a head.
"""

import ctypes
import os

import torch
from torch import Tensor

from .native import found

_UNIT, _MOST = 32, 256  # channels of a head


def attention(
    query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, scale: float, causal: bool = False, mask_BTS: Tensor | None = None
) -> Tensor | None:
    """softmax(scale query key' + mask) value as (B, T, H, D), bfloat16; None where it does not apply, see `applies`, and under torch.compile.

    Query head h reads key-value head h G // H. mask: bool, True where a query sees a key, of all batches or (1, T, S); causal: query t sees keys 0 to
    t. A query that sees nothing gets 0. Sums and softmax are float32, the softmax is rounded to bfloat16 before it multiplies values.
    """
    if torch.compiler.is_compiling() or not scale > 0 or not applies(query_BHTD, key_BGSD, value_BGSD, mask_BTS):
        return None
    batches, heads, queries, width = query_BHTD.shape
    y_BTHD = query_BHTD.new_empty((batches, queries, heads, width))
    places = [_place(x.data_ptr(), *x.stride()[:3]) for x in (query_BHTD, key_BGSD, value_BGSD)]
    mask = (
        _place(None, 0, 0) if mask_BTS is None else _place(mask_BTS.data_ptr(), 0 if len(mask_BTS) == 1 else mask_BTS.stride(0), mask_BTS.stride(1))
    )
    sizes = map(ctypes.c_long, (batches, heads, key_BGSD.shape[1], queries, key_BGSD.shape[2], width))
    function = found().library.planish_attention_bfloat16  # type: ignore[union-attr]
    function(*sum(places, ()), *mask, *sizes, ctypes.c_float(scale), int(causal), ctypes.c_void_p(y_BTHD.data_ptr()), torch.get_num_threads())
    return y_BTHD


def _place(at: int | None, *strides: int) -> tuple[ctypes.c_void_p | ctypes.c_long, ...]:
    return (ctypes.c_void_p(at), *map(ctypes.c_long, strides))


def applies(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_BTS: Tensor | None) -> bool:
    """Whether the pass computes this: bfloat16 on a CPU with the instructions, D a multiple of 32 up to 256, D dense, no gradient."""
    tensors = (query_BHTD, key_BGSD, value_BGSD)
    batches, heads, queries, width = query_BHTD.shape
    groups, keys = key_BGSD.shape[1:3]
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in tensors)
        and key_BGSD.shape == value_BGSD.shape == (batches, groups, keys, width)
        and width % _UNIT == 0
        and 0 < width <= _MOST
        and groups > 0
        and heads % groups == 0
        and (mask_BTS is None or _sees(mask_BTS, batches, queries, keys))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and there()
    )


def _sees(mask_BTS: Tensor, batches: int, queries: int, keys: int) -> bool:
    shapes = ((batches, queries, keys), (1, queries, keys))
    return mask_BTS.dtype == torch.bool and mask_BTS.device.type == "cpu" and mask_BTS.shape in shapes and (keys == 0 or mask_BTS.stride(2) == 1)


def there() -> bool:
    """Whether a compiler and the processor's instructions are."""
    return hasattr(found().library, "planish_attention_bfloat16")


def wins() -> bool:
    """Whether it is quicker than torch's attention, which is the quicker one with AMX. A ceiling on instructions (ONEDNN_MAX_CPU_ISA) is kept to."""
    return there() and not torch.cpu.get_capabilities().get("amx_bf16", False) and "ONEDNN_MAX_CPU_ISA" not in os.environ
