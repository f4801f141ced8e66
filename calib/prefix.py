"""A full-precision prefix: keys and values of a few tokens that stand before every text, computed once (PrefixQuant, Chen et al. 2024, arXiv:2410.05265).

Attention needs somewhere to put what it has no use for, and a model makes the first token, sometimes others, carry it: massive activations that no
grid of few bits holds. Given a prefix in full precision, no token of the text has to.

Shapes: keys and values (1, H, P, E): heads, prefix tokens, head size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..quant.errors import PlanishError


class _Fixed(DynamicLayer):
    """One block's prefix: attention gets it before its own keys and values, and it stays as it is."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, P + L, E) twice."""
        assert self.keys is not None
        assert self.values is not None
        batch = (len(key_states), -1, -1, -1)
        keys, values = self.keys.to(key_states).expand(batch), self.values.to(value_states).expand(batch)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self) -> int:
        """P."""
        return self.length


class PrefixCache(Cache):
    """The prefix of all blocks, as transformers' models take it (past_key_values). Shared by all batches, of any size; holds nothing of theirs."""

    def __init__(self, length: int, block_count: int) -> None:
        self.blocks = [_Fixed(length) for _ in range(block_count)]
        super().__init__(layers=list(self.blocks))
        self.length = length

    def put(self, index: int, keys: Tensor, values: Tensor) -> None:
        """The prefix of block `index`."""
        self.blocks[index].keys, self.blocks[index].values = keys, values
        self.blocks[index].is_initialized = True

    def tensors(self, index: int) -> dict[str, Tensor]:
        """What a checkpoint holds of block `index`."""
        block = self.blocks[index]
        assert block.keys is not None
        assert block.values is not None
        return {"key": block.keys, "value": block.values}

    def growing(self, batch: int, dtype: torch.dtype) -> DynamicCache:
        """A cache of its own for one batch that is generated: it begins with the prefix."""
        cache = DynamicCache()
        self.fill(cache, batch, dtype)
        return cache

    def fill(self, cache: Cache, batch: int, dtype: torch.dtype) -> None:
        """Put the prefix into an empty cache."""
        for index in range(len(self.blocks)):
            keys, values = (tensor.to(dtype).expand(batch, -1, -1, -1) for tensor in self.tensors(index).values())
            cache.update(keys, values, index)


def tensor_names(block: str) -> tuple[str, str]:
    """Names in a checkpoint of the keys and values of the block of that name."""
    return f"{block}.planish.prefix.key", f"{block}.planish.prefix.value"


def from_tensors(length: int, blocks: Iterable[str], tensors: Mapping[str, Tensor]) -> PrefixCache:
    """The prefix that a checkpoint holds. Raises PlanishError where its shape is wrong."""
    names = list(blocks)
    cache = PrefixCache(length, len(names))
    for index, block in enumerate(names):
        keys, values = (tensors[name] for name in tensor_names(block))
        if keys.dim() != 4 or keys.shape[0] != 1 or keys.shape[2] != length or values.shape[:3] != keys.shape[:3]:
            raise PlanishError(
                f"{tensor_names(block)[0]}: shape {tuple(keys.shape)}, values {tuple(values.shape)}, but the prefix is of {length} tokens. "
                "The checkpoint is damaged: compress again."
            )
        cache.put(index, keys, values)
    return cache
