"""Single passes on a CPU inside attention modules that otherwise stay the model's own: rotary embeddings of queries and keys, and attention itself
where planish has a quicker one than torch (`attention.wins`).

The modules of transformers call functions by names of their file: `apply_rotary_pos_emb`, and what ALL_ATTENTION_FUNCTIONS has for the model's
implementation. A module that gets passes is of a class derived from its own, whose forward is the same code with these names bound to the passes: the
first if the function makes the same of random values, bit for bit, the second for "sdpa", call by call where the pass computes what is asked.

Shape suffixes: B batches, H heads, G key-value heads, T tokens, S keys, D channels of a head.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ...quant.kernels import native
from ...quant.kernels.attention import attention, wins

_ROTARY, _ATTENTION = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"
_SAID = {_ROTARY: "rotary embedding in one pass", _ATTENTION: "attention in one pass"}
_MARK = "planish_passes"
_OTHERWISE = ("position_bias", "cache", "softcap", "s_aux", "output_attentions")  # arguments with which it is another attention
_DERIVED: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def put_passes(module: nn.Module, dtype: torch.dtype) -> None:
    """Let the attention module do in single passes what the passes compute as its own code does."""
    kind, width = type(module), getattr(module, "head_dim", None)
    names = _called(kind)
    if hasattr(kind, _MARK) or not isinstance(width, int):
        return
    chosen = []
    if (plain := names.get(_ROTARY)) is not None and _same(plain, width, dtype):
        chosen.append(_ROTARY)
    if isinstance(names.get(_ATTENTION), AttentionInterface) and dtype == torch.bfloat16 and wins():
        chosen.append(_ATTENTION)
    if chosen:
        key = kind, tuple(chosen)
        module.__class__ = _DERIVED[key] = _DERIVED.get(key) or _derived(kind, key[1])


def passes(module: nn.Module) -> str:
    """What put_passes did, in words; empty if nothing."""
    return ", ".join(_SAID[name] for name in getattr(type(module), _MARK, ()))


def _called(kind: type[nn.Module]) -> dict[str, Any]:
    """What the forward of this class finds under the names."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or forward.__closure__ is not None:
        return {}
    return {name: forward.__globals__.get(name) for name in (_ROTARY, _ATTENTION) if name in forward.__code__.co_names}


@torch.no_grad()
def _same(plain: Callable[..., Any], width: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 5, width), (2, 1, 5, width), *[(2, 5, width)] * 2))
    found = _turned(query, key, cos, sin)
    return found is not None and all(map(torch.equal, found, plain(query, key, cos, sin)))


def _turned(query_BHTD: Tensor, key_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    query, key = (native.rotary(x_BHTD, cos_BTD, sin_BTD) for x_BHTD in (query_BHTD, key_BHTD))
    return None if query is None or key is None else (query, key)


def _turning(plain: Callable[..., Any]) -> Callable[..., Any]:
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        found = None if more or named else _turned(q, k, cos, sin)
        return plain(q, k, cos, sin, *more, **named) if found is None else found

    return turn


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any) -> tuple[Tensor, Tensor | None]:
    """What transformers' sdpa_attention_forward computes, in one pass where there is one for it. query (B, H, T, D), key, value (B, G, S, D),
    attention_mask None or (B, 1, T, S). Returns (B, T, H, D) and None."""
    plain = not named.get("dropout") and not any(named.get(name) is not None and named[name] is not False for name in _OTHERWISE)
    if plain and (attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)):
        given, tokens = named.get("is_causal"), query.shape[2]
        causal = attention_mask is None and tokens > 1 and (getattr(module, "is_causal", True) if given is None else bool(given))
        keys = tokens if causal else key.shape[2]  # a static cache that is empty yet has room behind the tokens
        scale = named.get("scaling")
        y_BTHD = attention(
            query,
            key[:, :, :keys],
            value[:, :, :keys],
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            causal=causal,
            mask_BTS=None if attention_mask is None else attention_mask[:, 0],
        )
        if y_BTHD is not None:
            return y_BTHD, None
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    return found


def _attending() -> AttentionInterface:
    """What is there, but for "sdpa"."""
    interface = AttentionInterface()  # type: ignore[no-untyped-call]
    interface["sdpa"] = attend
    return interface


def _derived(kind: type[nn.Module], chosen: tuple[str, ...]) -> type[nn.Module]:
    forward, called = kind.forward, _called(kind)
    assert isinstance(forward, FunctionType)
    bound = {_ROTARY: _turning, _ATTENTION: lambda _: _attending()}
    names = {**forward.__globals__, **{name: bound[name](called[name]) for name in chosen}}  # type: ignore[no-untyped-call]
    del names["__name__"]  # torch.compile would look names up in the module of that name
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    ours.__kwdefaults__, ours.__module__ = forward.__kwdefaults__, forward.__module__
    return type(kind.__name__, (kind,), {"forward": ours, "__module__": kind.__module__, _MARK: chosen})
