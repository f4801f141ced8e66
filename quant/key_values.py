"""Keys and values as a cache of few bits holds them: codes on a grid of their own for each token and head.

(QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4, stage 1d; KIVI, Liu et al. 2024, arXiv:2402.02750, for the per-token grid of values.)
Keys have outlier channels, which a Hadamard of the head's size spreads (R3). It cannot be absorbed by the rows of q and k, for RoPE stands between;
but scores stay what they are when queries turn along: (q H) (k H)' = q k'. So both are turned behind RoPE, and nothing is turned back.

Shape suffixes: B samples, N query heads, K key heads, L tokens of the queries, S of the keys, D channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PlanishError
from .formats import ActivationFormat
from .linear import quantize_input
from .transforms.hadamard import rotate

LEAST, MOST = 2, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCache:
    """How keys and values are held. bits: of a code; symmetric, clip: as of activations; what differs is that a group is a token's head."""

    bits: int = 4
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not LEAST <= self.bits <= MOST:
            raise PlanishError(f"kv_cache.bits is {self.bits}, but codes of keys and values have {LEAST} to {MOST} bits. Usual: 8 or 4.")
        if not 0 < self.clip <= 1:
            raise PlanishError(f"kv_cache.clip is {self.clip}, but it is the part of the range to cover, above 0 and at most 1. Use 1.")

    def held(self, x: Tensor) -> Tensor:
        """What codes make of keys or values (..., D): the same shape and dtype. The gradient passes as if nothing were rounded."""
        fmt = ActivationFormat(bits=self.bits, symmetric=self.symmetric, clip=self.clip)
        coded = quantize_input(x.detach().reshape(-1, x.shape[-1]).float(), fmt).dequantize().reshape(x.shape).to(x.dtype)
        return x + (coded - x).detach() if x.requires_grad else coded


@dataclass(frozen=True, slots=True)
class HeldKeyValues:
    """A model's keys and values. rotated: behind R3. first: so many first tokens are a prefix, which stays in full precision."""

    cache: KvCache
    rotated: bool = False
    first: int = 0

    def through(self, query_BNLD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is computed with instead."""
        if self.rotated:
            query_BNLD, key_BKSD = rotate(query_BNLD), rotate(key_BKSD)
        return query_BNLD, self._held(key_BKSD), self._held(value_BKSD)

    def _held(self, x_BKSD: Tensor) -> Tensor:
        if not self.first:
            return self.cache.held(x_BKSD)
        return torch.cat([x_BKSD[:, :, : self.first], self.cache.held(x_BKSD[:, :, self.first :])], dim=2)
