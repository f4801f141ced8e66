"""Streaming statistics of one site's input, channel by channel. They merge: over batches, and over ranks that saw different samples.

One pass over the data, in pieces that stay in the processor's cache. Sums are kept in float64.

Shape suffixes: T tokens, C channels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..quant.errors import PlanishError
from ..quant.pieces import pieces
from .sketch import QuantileSketch

STRIDE = 7  # every seventh token kept enters the channels' sketch; prime to window lengths, so that every position has its turn
_FOLD = 32
_MOST_CUTS = 8  # sink tokens of a batch up to which it is taken in around them


class Extremes:
    """The range of x (T, C) over the tokens kept: all that scales need, at a fraction of the cost of ChannelStatistics.

    minimum_C, maximum_C: float32, infinite while no token was kept. tokens: number kept. name: the site, for messages.
    """

    def __init__(self, channel_count: int, name: str = "a site") -> None:
        self.name = name
        self.tokens = 0
        self.minimum_C = torch.full((channel_count,), torch.inf)
        self.maximum_C = torch.full((channel_count,), -torch.inf)

    @torch.no_grad()
    def update(self, x_TC: Tensor, keep_T: Tensor | None = None) -> None:
        """Take in x: (T, C) of any float type. keep_T: bool, False for the sink tokens, which are left out; None keeps all."""
        for kept_TC in _runs(x_TC, keep_T):
            self.widen(len(kept_TC), _over_tokens(torch.amin, kept_TC), _over_tokens(torch.amax, kept_TC))

    def within(self, bound: float) -> bool:
        """Whether no value is further from zero than `bound`. NaN is not."""
        return bool(self.minimum_C.amin() >= -bound) and bool(self.maximum_C.amax() <= bound)

    def widen(self, tokens: int, minimum_C: Tensor, maximum_C: Tensor) -> None:
        """Take in the range of more tokens, which may lie on another device: the result lies there too."""
        self.tokens += tokens
        self.minimum_C = torch.minimum(self.minimum_C.to(minimum_C.device), minimum_C)
        self.maximum_C = torch.maximum(self.maximum_C.to(maximum_C.device), maximum_C)

    @property
    def absmax_C(self) -> Tensor:
        """Largest |x| of each channel: (C,) float32. Raises PlanishError if no token was kept, as all figures below do."""
        self._check_any()
        return torch.maximum(-self.minimum_C, self.maximum_C)

    def _check_any(self) -> None:
        if not self.tokens:
            raise PlanishError(f"Statistics of {self.name}: not one token was kept. Give more calibration text.")


def _runs(x_TC: Tensor, keep_T: Tensor | None) -> list[Tensor]:
    """The tokens kept: views of x where few are left out, a copy where many are."""
    left_out = [] if keep_T is None else (~keep_T).nonzero().flatten().tolist()
    if len(left_out) > _MOST_CUTS:
        return [x_TC[keep_T]] if len(left_out) < len(x_TC) else []
    ends = zip([-1, *left_out], [*left_out, len(x_TC)], strict=True)
    return [x_TC[before + 1 : after] for before, after in ends if after > before + 1]


def _over_tokens(reduce: Callable[[Tensor, int], Tensor], x_TC: Tensor) -> Tensor:
    """reduce(x_TC, 0) as float32, in two steps: several times faster than in one for bfloat16."""
    rows = len(x_TC) // _FOLD
    if rows < 2:
        return reduce(x_TC, 0).float()
    whole_C = reduce(reduce(x_TC[: rows * _FOLD].reshape(_FOLD, rows, -1), 1), 0)
    rest_TC = torch.cat([whole_C[None], x_TC[rows * _FOLD :]])
    return reduce(rest_TC, 0).float()


class Ranges(Extremes):
    """Ranges and sums of x (T, C) over the tokens kept. sum_C, square_C: float64 sums of x and of x^2 (squares taken in float32)."""

    def __init__(self, channel_count: int, name: str = "a site") -> None:
        super().__init__(channel_count, name)
        self.sum_C = torch.zeros(channel_count, dtype=torch.float64)
        self.square_C = torch.zeros(channel_count, dtype=torch.float64)

    @property
    def mean_C(self) -> Tensor:
        """(C,) float64."""
        self._check_any()
        return self.sum_C / self.tokens

    @property
    def second_C(self) -> Tensor:
        """Mean of x^2, not centred: (C,) float64."""
        self._check_any()
        return self.square_C / self.tokens

    def add(self, tokens: int, minimum_C: Tensor, maximum_C: Tensor, sum_C: Tensor, square_C: Tensor) -> None:
        """Take in the ranges and sums of more tokens, which may lie on another device: the result lies there too."""
        self.widen(tokens, minimum_C, maximum_C)
        self.sum_C = self.sum_C.to(sum_C.device) + sum_C
        self.square_C = self.square_C.to(square_C.device) + square_C

    def add_ranges(self, other: "Ranges") -> None:
        """Take in what another one has seen."""
        self.add(other.tokens, other.minimum_C, other.maximum_C, other.sum_C, other.square_C)

    def check_finite(self) -> None:
        """PlanishError, naming the site and channels, if a value seen was not finite or too large to be squared."""
        bad_C = ~(torch.isfinite(self.minimum_C) & torch.isfinite(self.maximum_C) & torch.isfinite(self.square_C))
        if bool(bad_C.any()):
            where = ", ".join(map(str, bad_C.nonzero()[:4, 0].tolist()))
            raise PlanishError(
                f"The input of {self.name} is not finite in {int(bad_C.sum())} of {len(bad_C)} channels (first: {where}). "
                "Run the model in bfloat16 or float32, and check its weights."
            )


class ChannelStatistics(Ranges):
    """Ranges, sums and quantiles of x (T, C) over the tokens kept.

    channels: sketch of |x| in each channel, of every seventh token. token_maxima: sketch of each token's max|x|, of every token.
    """

    def __init__(self, channel_count: int, name: str = "a site") -> None:
        super().__init__(channel_count, name)
        self.channels = QuantileSketch(channel_count)
        self.token_maxima = QuantileSketch(1, bits=5)

    @torch.no_grad()
    def update(self, x_TC: Tensor, keep_T: Tensor | None = None) -> None:
        """Take in x: (T, C) of any float type. keep_T: bool, False for the sink tokens, which are left out of everything; None keeps all.

        Raises PlanishError, with nothing taken in, if a kept value is not finite.
        """
        seen = Ranges(len(self.minimum_C), self.name)
        maxima: list[Tensor] = []
        sampled: list[Tensor] = []
        for piece_TC in _pieces(x_TC, keep_T):
            sampled.append(piece_TC[-(self.tokens + seen.tokens) % STRIDE :: STRIDE].clone())
            exact_TC = piece_TC.float()
            maxima.append(exact_TC.abs().amax(1))
            low_C, high_C, sum_C = exact_TC.amin(0), exact_TC.amax(0), exact_TC.sum(0, dtype=torch.float64)
            seen.add(len(exact_TC), low_C, high_C, sum_C, exact_TC.square().sum(0, dtype=torch.float64))
        if seen.tokens:
            seen.check_finite()
            self.add_ranges(seen)
            self.token_maxima.update(torch.cat(maxima)[:, None])
            self.channels.update(torch.cat(sampled))

    def merge(self, other: "ChannelStatistics") -> None:
        """Take in what another one has seen. The channels' sketch then holds every seventh token of each of the two."""
        self.add_ranges(other)
        self.channels.merge(other.channels)
        self.token_maxima.merge(other.token_maxima)

    def quantile_C(self, q: float) -> Tensor:
        """The q-quantile of |x| in each channel, never above its maximum: (C,) float64. Of every seventh token, error as of QuantileSketch."""
        return torch.minimum(self.channels.quantile(q), self.absmax_C.double())


def _pieces(x_TC: Tensor, keep_T: Tensor | None) -> Iterator[Tensor]:
    """The tokens kept, in pieces: views, and copies where a piece holds a token that is left out."""
    for rows in pieces(x_TC):
        piece_TC = x_TC[rows]
        if keep_T is not None:
            keep = keep_T[rows]
            piece_TC = piece_TC if bool(keep.all()) else piece_TC[keep]
        if len(piece_TC):
            yield piece_TC
