"""Rotary embeddings in one pass over queries and keys on a CPU, inside attention modules that otherwise stay the model's own.

The modules of transformers call a function of their file by its name, `apply_rotary_pos_emb`. A module that gets the pass is of a class derived from
its own, whose forward is the same code with that one name bound to the pass, if the function makes the same of random values, bit for bit.

Shape suffixes: B batches, H heads, T tokens, D channels of a head.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.kernels import native

_NAME = "apply_rotary_pos_emb"
_MARK = "planish_rotary"
_DERIVED: dict[type[nn.Module], type[nn.Module]] = {}


def put_rotary(attention: nn.Module, dtype: torch.dtype) -> None:
    """Let the module turn queries and keys in one pass, if its own function does what the pass does."""
    kind, width = type(attention), getattr(attention, "head_dim", None)
    plain = _function(kind)
    if plain is not None and isinstance(width, int) and not has_rotary(attention) and _same(plain, width, dtype):
        attention.__class__ = _DERIVED[kind] = _DERIVED.get(kind) or _derived(kind)


def has_rotary(attention: nn.Module) -> bool:
    """Whether put_rotary did so."""
    return hasattr(type(attention), _MARK)


def _function(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """What the forward of this class calls by that name."""
    forward = kind.forward
    plain = isinstance(forward, FunctionType) and forward.__closure__ is None and _NAME in forward.__code__.co_names
    return forward.__globals__.get(_NAME) if plain else None


@torch.no_grad()
def _same(plain: Callable[..., Any], width: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 5, width), (2, 1, 5, width), *[(2, 5, width)] * 2))
    found = _turned(query, key, cos, sin)
    return found is not None and all(map(torch.equal, found, plain(query, key, cos, sin)))


def _turned(query_BHTD: Tensor, key_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    query, key = (native.rotary(x_BHTD, cos_BTD, sin_BTD) for x_BHTD in (query_BHTD, key_BHTD))
    return None if query is None or key is None else (query, key)


def _derived(kind: type[nn.Module]) -> type[nn.Module]:
    forward, plain = kind.forward, _function(kind)
    assert isinstance(forward, FunctionType)
    assert plain is not None

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        found = None if more or named else _turned(q, k, cos, sin)
        return plain(q, k, cos, sin, *more, **named) if found is None else found

    names = {**forward.__globals__, _NAME: turn}
    del names["__name__"]  # torch.compile would look names up in the module of that name
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    ours.__kwdefaults__, ours.__module__ = forward.__kwdefaults__, forward.__module__
    return type(kind.__name__, (kind,), {"forward": ours, "__module__": kind.__module__, _MARK: True})
