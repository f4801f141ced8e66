"""The range of one site's input, channel by channel, over batches.

Shape suffixes: T tokens, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...quant.errors import PlanishError

_FOLD = 32
_MOST_CUTS = 8  # sink tokens of a batch up to which it is taken in around them


class Extremes:
    """The range of x (T, C) over the tokens kept: all that scales need.

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
        """Largest |x| of each channel: (C,) float32. Raises PlanishError if no token was kept."""
        if not self.tokens:
            raise PlanishError(f"Statistics of {self.name}: not one token was kept. Give more calibration text.")
        return torch.maximum(-self.minimum_C, self.maximum_C)


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
