"""A full-precision prefix: keys and values of a few tokens that stand before every text, computed once.

(PrefixQuant, Chen et al. 2024, arXiv:2410.05265, section 4.)
Attention needs somewhere to put what it has no use for, and a model makes the first token, sometimes others, carry it: massive activations that no
grid of few bits holds. Given a prefix in full precision, no token of the text has to.

Shapes: keys and values (1, H, P, E): heads, prefix tokens, head size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ...quant.errors import PlanishError

NEWLINE = r'"\n"'


class _Fixed(DynamicLayer):  # type: ignore[no-untyped-call]
    """One block's prefix: attention gets it before its own keys and values, and it stays as it is."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        """What a checkpoint holds of block `index`: key, then value."""
        block = self.blocks[index]
        assert block.keys is not None
        assert block.values is not None
        return {"key": block.keys, "value": block.values}

    def fill(self, cache: Cache, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Put the prefix into an empty cache."""
        for index in range(len(self.blocks)):
            keys, values = (tensor.to(device, dtype).expand(batch, -1, -1, -1) for tensor in self.tensors(index).values())
            cache.update(keys, values, index)


class PrefixStream:
    """The prefix on its way through the model in full precision, leaving keys and values of each block in `cache`, rounded to what is stored."""

    def __init__(
        self, cache: PrefixCache, stored: torch.dtype, start: Callable[[Cache], tuple[Tensor, Callable[[nn.Module, int, Tensor], Tensor]]]
    ) -> None:
        """start(seen): what enters the first block (1, P, D), and what runs it through one, noting keys and values in `seen`."""
        self.cache, self._stored, self._seen = cache, stored, DynamicCache()
        self._hidden, self._run = start(self._seen)

    def advance(self, block: nn.Module, index: int) -> None:
        """Run the prefix through full-precision block `index`, from where on the cache has that block's part."""
        self._hidden = self._run(block, index, self._hidden)
        layer = self._seen.layers[index]
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        self.cache.put(index, self._rounded(layer.keys), self._rounded(layer.values))

    def turn_values(self, index: int, heads: int, turn: Callable[[Tensor], Tensor]) -> None:
        """Let the values of block `index` go through what the rows of v have taken in. turn: of the channels of o's input, (P, C), C = heads * E.

        They are float32 then, not rounded; `round_values` does that. Query heads that share a key-value head are turned alike.
        """
        keys, values = self.cache.tensors(index).values()
        shared = heads // values.shape[1]
        x_PC = values[0].float().repeat_interleave(shared, dim=0).transpose(0, 1).flatten(1)
        self.cache.put(index, keys, turn(x_PC).view(len(x_PC), heads, -1)[:, ::shared].transpose(0, 1)[None].contiguous())

    def round_values(self, index: int) -> None:
        """To what is stored, in the keys' dtype."""
        keys, values = self.cache.tensors(index).values()
        self.cache.put(index, keys, self._rounded(values).to(keys.dtype))

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._stored).to(tensor.dtype)


def prefix_ids(tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The numbers of these tokens: numbers as they are, bos as the tokenizer says, other texts if they are one token. Raises PlanishError."""
    return tuple(_prefix_id(token, tokenizer) for token in tokens)


def _prefix_id(token: str | int, tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(token, int):
        if not 0 <= token < len(tokenizer):
            raise PlanishError(f"prefix.tokens: {token} is no token of the model, which has {len(tokenizer)}. Give a number from 0 on.")
        return token
    if token == "bos":
        if not isinstance(tokenizer.bos_token_id, int):
            raise PlanishError(f"prefix.tokens: bos, but the model's tokenizer has no token for a beginning. Give another, such as {NEWLINE}.")
        return tokenizer.bos_token_id
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise PlanishError(f"prefix.tokens: {token!r} is {len(ids)} tokens of the model, {ids}. Give each on its own, as text or number.")
    return int(ids[0])


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
