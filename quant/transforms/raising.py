"""The step that gives more bits to the activations of a few sites: those where few bits cost most.

The input of down is where 4 bits cost most in nearly every study, but not in every block. Which sites these are is measured on the full-precision
model before the walk.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import PlanishError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class RaiseActivations:
    """bits: of the raised activations. share: of all the model's sites that may be raised, at most."""

    bits: int = 8
    share: float = 0.05
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise PlanishError(f"raise_activations.bits is {self.bits}, but integer formats have 2 to 8 bits, and these are more. Usual: 8.")
        if not 0 < self.share <= 1:
            raise PlanishError(f"raise_activations.share is {self.share}, but it is a part of the model's sites, above 0 and at most 1. Usual: 0.05.")

    def count(self, sites: int) -> int:
        """How many of so many sites may be raised."""
        return int(self.share * sites + 1e-9)


def neediest(errors: Mapping[Key, tuple[float, float]], count: int) -> list[Key]:
    """The `count` keys, at most, whose squared error falls most from the first to the second number; none whose error does not fall."""
    gains = {key: before**2 - after**2 for key, (before, after) in errors.items()}
    return sorted((key for key in gains if gains[key] > 0), key=lambda key: -gains[key])[:count]
