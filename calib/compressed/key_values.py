"""Attention that sees keys and values as a cache of few bits holds them, in models of transformers.

transformers asks the module's config which function computes attention, and gives it queries, keys and values behind RoPE and behind the cache. A
module that holds codes gets a config of its own, with a function that rounds what it is given and passes it on to the one that was there. Rounding is
by token and head, so it makes no difference whether it is done before a token enters the cache or, as here, whenever it is read.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ...quant.errors import PlanishError
from ...quant.key_values import HeldKeyValues, KvCache
from ..blocks.sites import BlockTopology, Topology

NAME = "planish_key_values"
_HELD, _BEFORE = "planish_held", "planish_config"  # on the attention module: what it holds, and the config that it had


def check_key_values(cache: KvCache | None, known: Topology, sliding_window: int | None, prefixed: bool) -> None:
    """PlanishError where keys and values cannot be held in codes: no attention to what came before, or windows that move past a prefix."""
    if cache is None:
        return
    if not known.has_cache:
        raise PlanishError(f"kv_cache: a {known.family} model has no cache of keys and values in every block. Leave it out.")
    if prefixed and sliding_window is not None:
        raise PlanishError(
            "kv_cache: this model's attention has windows, which move past a prefix, so it is not known which keys stay in full precision. "
            "Leave out prefix or kv_cache."
        )


def hold(block: nn.Module, known: BlockTopology, held: HeldKeyValues | None) -> None:
    """Let the block's attention see keys and values like this from now on; None: as they are."""
    if known.attention is None:
        return
    hold_in(block.get_submodule(known.attention.module), held)


def hold_in(attention: nn.Module, held: HeldKeyValues | None) -> None:
    """As `hold`, given the module that computes the scores."""
    module: Any = attention
    if _HELD in vars(module):
        module.config = vars(module).pop(_BEFORE)
        del vars(module)[_HELD]
    if held is None:
        return
    vars(module)[_BEFORE], vars(module)[_HELD] = module.config, held
    module.config = copy.copy(module.config)
    module.config._attn_implementation = NAME


@contextmanager
def holding(block: nn.Module, known: BlockTopology, held: HeldKeyValues | None) -> Iterator[None]:
    """`hold` while the `with` lasts."""
    if held is None:
        yield
        return
    hold(block, known, held)
    try:
        yield
    finally:
        hold(block, known, None)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any) -> Any:
    held, before = vars(module)[_HELD], vars(module)[_BEFORE]
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined, unused-ignore]
    compute = ALL_ATTENTION_FUNCTIONS.get_interface(before._attn_implementation, eager)
    return compute(module, *held.through(query, key, value), attention_mask, **given)


AttentionInterface.register(NAME, _attend)
