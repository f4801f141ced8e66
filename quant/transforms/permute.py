"""Zigzag permutation: channels dealt to blocks so that all blocks have about the same peak (DuQuant, Lin et al. 2024, arXiv:2406.01721, section 3.3).

Shape suffixes: C channels, K blocks of B channels, Q query heads of D channels, G key-value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanishError


@dataclass(frozen=True, kw_only=True, slots=True)
class Permute:
    """Deal the channels of the inputs of down, and within each head of o, to blocks of equal peak; the layers before take the order for free.

    block: channels of a block at most, as of the block rotation that the step is meant for; the largest divisor of the width is taken.
    """

    block: int = 128
    sites: tuple[str, ...] = ("*.o", "*.down")

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PlanishError(f"permute.block is {self.block}, but a block has at least 1 channel. Usual: 128, as the rotation behind it has.")


def zigzag(magnitude_C: Tensor, blocks: int) -> Tensor:
    """Sorts channels by magnitude, falling, and deals them to the blocks 1..K, K..1, 1..K, ...; equal ones in their order.

    magnitude_C: (C,), say max|x| of each. Returns index_C for a `Permutation`: (C,) int64; channels index_C[k B : (k + 1) B] make block k.
    Raises PlanishError if the blocks cannot be of one size.
    """
    channels = len(magnitude_C)
    if blocks < 1 or channels % blocks:
        raise PlanishError(f"{channels} channels cannot be dealt to {blocks} blocks of one size. Choose a number of blocks that divides {channels}.")
    rounds_BK = magnitude_C.argsort(descending=True, stable=True).reshape(-1, blocks)
    rounds_BK[1::2] = rounds_BK[1::2].flip(1)
    return rounds_BK.T.reshape(-1)


def zigzag_in_heads(magnitude_C: Tensor, kv_heads: int, head_dim: int, blocks: int) -> Tensor:
    """The same within each head: what v_proj's rows and o_proj's columns can absorb, as attention mixes no channels of a head.

    magnitude_C: (C,) of o_proj's input, C = Q D. Query heads that share a key-value head share the order of its channels: by the greatest
    magnitude of any. blocks: of each head. Returns index_C: (C,) int64. Raises PlanishError if the heads do not make up C.
    """
    channels = len(magnitude_C)
    if channels % (kv_heads * head_dim):
        raise PlanishError(f"{channels} channels are not made up of {kv_heads} key-value heads of {head_dim} channels.")
    magnitude_GQD = magnitude_C.reshape(kv_heads, -1, head_dim)
    order_GD = torch.stack([zigzag(magnitude_D, blocks) for magnitude_D in magnitude_GQD.amax(1)])
    first_GQ = torch.arange(0, channels, head_dim, device=magnitude_C.device).reshape(kv_heads, -1)
    return (first_GQ[..., None] + order_GD[:, None]).reshape(-1)
