"""Attention of bfloat16 in one pass on CPUs with AVX512-BF16, several times as fast there as torch's (attention.h).

One more operator in torch's namespace `planish`, for CPUs only, and `attention`, which calls it where it applies.

Shape suffixes: B batches, H query heads, G key-value heads, T queries, S keys, D channels of a head.
"""

import ctypes
import os

import torch
from torch import Tensor

from .native import found
from .schemas import LIBRARY

_UNIT, _MOST = 32, 256  # channels of a head
SCHEMA = "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> Tensor"
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))  # type: ignore[no-untyped-call]


def attention(
    query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, scale: float, causal: bool = False, mask_BTS: Tensor | None = None
) -> Tensor | None:
    """softmax(scale query key' + mask) value as (B, T, H, D), bfloat16; None where it does not apply, see `applies`, or is not there.

    Query head h reads key-value head h G // H. mask: bool, True where a query sees a key, of all batches or (1, T, S); causal: query t sees keys 0 to
    t. A query that sees nothing gets 0. Sums and softmax are float32, the softmax is rounded to bfloat16 before it multiplies values.
    """
    if not scale > 0 or not applies(query_BHTD, key_BGSD, value_BGSD, mask_BTS) or not (torch.compiler.is_compiling() or there()):
        return None
    y_BTHD: Tensor = torch.ops.planish.attention(query_BHTD, key_BGSD, value_BGSD, mask_BTS, scale, causal)
    return y_BTHD


def applies(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_BTS: Tensor | None) -> bool:
    """Whether the pass computes this: bfloat16 on a CPU, D a multiple of 32 up to 256, D dense, no gradient."""
    tensors = (query_BHTD, key_BGSD, value_BGSD)
    batches, heads, queries, width = query_BHTD.shape
    groups, keys = key_BGSD.shape[1], key_BGSD.shape[2]
    return (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in tensors)
        and key_BGSD.shape == value_BGSD.shape
        and key_BGSD.shape[0] == batches
        and key_BGSD.shape[3] == width
        and width % _UNIT == 0
        and 0 < width <= _MOST
        and groups > 0
        and heads % groups == 0
        and (mask_BTS is None or _sees(mask_BTS, batches, queries, keys))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def _sees(mask_BTS: Tensor, batches: int, queries: int, keys: int) -> bool:
    alike = mask_BTS.shape[0] in (1, batches) and mask_BTS.shape[1] == queries and mask_BTS.shape[2] == keys
    return alike and mask_BTS.dtype == torch.bool and mask_BTS.device.type == "cpu" and (keys == 0 or mask_BTS.stride(2) == 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    batches, heads, queries, width = query.shape
    y_BTHD = query.new_empty((batches, queries, heads, width))
    places = [_place(x.data_ptr(), *x.stride()[:3]) for x in (query, key, value)]
    places.append(_place(None, 0, 0) if mask is None else _place(mask.data_ptr(), 0 if len(mask) == 1 else mask.stride(0), mask.stride(1)))
    sizes = map(ctypes.c_long, (batches, heads, key.shape[1], queries, key.shape[2], width))
    function = found().library.planish_attention_bfloat16  # type: ignore[union-attr]
    function(*sum(places, ()), *sizes, ctypes.c_float(scale), int(causal), ctypes.c_void_p(y_BTHD.data_ptr()), torch.get_num_threads())
    return y_BTHD


def _place(at: int | None, *strides: int) -> tuple[ctypes.c_void_p | ctypes.c_long, ...]:
    return (ctypes.c_void_p(at), *map(ctypes.c_long, strides))


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    batches, heads, queries, width = query.shape
    return query.new_empty((batches, queries, heads, width))


LIBRARY.impl("attention", _attention, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("planish::attention", _fake, lib=LIBRARY)


def there() -> bool:
    """Whether a compiler and the processor's instructions are."""
    return hasattr(found().library, "planish_attention_bfloat16")


def wins() -> bool:
    """Whether it was measured to be quicker than torch's attention: not with AMX, which that one uses. ONEDNN_MAX_CPU_ISA is kept to."""
    return there() and not torch.cpu.get_capabilities().get("amx_bf16", False) and "ONEDNN_MAX_CPU_ISA" not in os.environ
