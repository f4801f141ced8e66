"""The step that puts a full-precision prefix before every text (PrefixQuant, Chen et al. 2024, arXiv:2410.05265)."""

from dataclasses import dataclass
from typing import Literal

from ..errors import PlanishError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """tokens: texts of single tokens or their numbers; bos stands for the tokenizer's token for a beginning. Their keys and values are kept.

    auto: those that a pass over some calibration text finds to be outliers, as many as the worst site has on average; none if there are no outliers.
    """

    tokens: tuple[str | int, ...] | Literal["auto"] = ("bos",)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise PlanishError('prefix.tokens is empty. Give at least one token, such as bos or "\\n", or leave the step out.')
