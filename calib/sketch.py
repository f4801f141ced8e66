"""A mergeable sketch of the quantiles of magnitudes, with a bound on its relative error.

Buckets are read off the bits of a float32: its exponent and the first `bits` bits of its mantissa, so every octave holds 2^bits buckets of
equal width. A bucket [a, b) answers with 2ab / (a + b), off by at most (b - a) / (b + a) <= 1 / (2^(bits+1) + 1): 5.9 % with 3 bits, 1.5 % with 5.
Counts are integers, so merging is exact and the order of what is counted does not matter.
The idea of logarithmic buckets is that of DDSketch (Masson, Rim and Lee, 2019); the buckets are those of HdrHistogram.

Shape suffixes: T tokens, R rows (one distribution each), B buckets.
"""

import math

import torch
from torch import Tensor

from ..quant.errors import PlanishError

OCTAVES = (-24, 24)  # magnitudes below 2^-24 count as 0, those from 2^24 on as the last bucket
_MANTISSA = 23
_BIAS = 127


class QuantileSketch:
    """Quantiles of R distributions of magnitudes.

    counts_RB: int64; bucket 0 holds what is below 2^-24, the last one what is 2^24 and more. Memory: 48 * 2^bits * 8 bytes a row.
    """

    def __init__(self, rows: int, bits: int = 3) -> None:
        self.bits = bits
        self.counts_RB = torch.zeros(rows, ((OCTAVES[1] - OCTAVES[0]) << bits) + 2, dtype=torch.int64)

    @property
    def relative_error(self) -> float:
        """The bound: of quantiles within [2^-24, 2^24), against the value that has that rank."""
        return 1 / ((2 << self.bits) + 1)

    def update(self, x_TR: Tensor) -> None:
        """Count |x|: (T, R), finite, of any float type."""
        rows, buckets = self.counts_RB.shape
        self.counts_RB = self.counts_RB.to(x_TR.device)
        first = ((OCTAVES[0] + _BIAS) << self.bits) - 1
        bucket_TR = x_TR.float().abs().contiguous().view(torch.int32) >> (_MANTISSA - self.bits)
        index_TR = bucket_TR.sub_(first).clamp_(0, buckets - 1).long()
        index_TR += torch.arange(0, rows * buckets, buckets, device=x_TR.device)
        self.counts_RB.view(-1).scatter_add_(0, index_TR.view(-1), self.counts_RB.new_ones(1).expand(index_TR.numel()))

    def merge(self, other: "QuantileSketch") -> None:
        """Add what another sketch of the same shape has counted."""
        self.counts_RB += other.counts_RB.to(self.counts_RB.device)

    def pooled(self) -> "QuantileSketch":
        """One distribution: of all rows together."""
        sketch = QuantileSketch(1, self.bits)
        sketch.counts_RB = self.counts_RB.sum(0, keepdim=True)
        return sketch

    def quantile(self, q: float) -> Tensor:
        """(R,) float64. Equivalent, up to the error, to numpy.quantile(|x|, q, axis=0, method="inverted_cdf"): the value of rank ceil(q * n).

        Raises PlanishError where nothing was counted.
        """
        counted_R = self.counts_RB.sum(1)
        if not counted_R.numel() or not bool(counted_R.all()):
            raise PlanishError("Quantiles of no values: not one token was kept. Give more calibration text.")
        rank_R = (counted_R.double() * q).ceil().clamp(min=1).long()
        return self._values().to(rank_R.device)[torch.searchsorted(self.counts_RB.cumsum(1), rank_R[:, None])[:, 0]]

    def _values(self) -> Tensor:
        """What each bucket answers: (B,) float64."""
        per_octave = 1 << self.bits
        edges = torch.tensor([math.ldexp(1 + k / per_octave, octave) for octave in range(*OCTAVES) for k in range(per_octave)], dtype=torch.float64)
        edges = torch.cat((edges, edges.new_tensor([math.ldexp(1.0, OCTAVES[1])])))
        middle = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])
        return torch.cat((edges.new_zeros(1), middle, edges[-1:]))
