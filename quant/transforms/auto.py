"""The step that chooses a site's transform among candidates, by what quantization then costs on tokens that no candidate was fitted to.

What is measured is trial.py's; here is what the candidates are, what they cost to run, and which one is taken. Of the demo model at W4A4 the median
site's outputs are off by 28 % with nothing, 18 % with a scale, 14 % with a Hadamard, 12 % with both, 10 % with blocks of CAT: which gain a third over
scale and Hadamard at some sites and 3 % at others. DuQuant's rotations, also 14 %, cost as much to run as CAT's blocks and more to find: no default.

Shape suffixes: C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from ..errors import PlanishError
from ..named import Named
from .factors import Blocks, Chain, Factor, Hadamard, Kronecker, Reflection
from .inputs import Cat, Center, Duquant, Wush
from .inputs import Hadamard as HadamardStep

INPUT_STEPS: dict[str, type] = {"shift": Center, "hadamard": HadamardStep, "duquant": Duquant, "cat": Cat, "wush": Wush}
"""What candidates are made of."""
Candidate = tuple[Annotated[Center | HadamardStep | Duquant | Cat | Wush, Named(INPUT_STEPS)], ...]
NOTHING = "none"
"""The name of the candidate that does nothing."""

DEFAULT: tuple[Candidate, ...] = (
    (),
    (Cat(block=1, hadamard=False),),
    (HadamardStep(),),
    (Cat(block=1),),
    (Center(), Cat(block=1)),
    (Cat(block=96),),
    (Center(), Cat(block=96)),
    (Wush(block=96),),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen at a site. names: of the candidates, as recipes write them; errors: relative, of the readers' outputs on held-out tokens;
    costs: as of `cost`; chosen: a position in them."""

    names: tuple[str, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]
    chosen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Auto:
    """At each matching site the candidate with which quantized outputs are off least; nothing at all is always one of them.

    held_out: the share of the calibration's tokens, its last, that candidates are judged by and not fitted to; the one chosen is fitted to all.
    margin: candidates whose error is larger than the least by at most this part count as equals, of which the cheapest to run is taken.
    """

    candidates: tuple[Candidate, ...] = DEFAULT
    held_out: float = 0.25
    margin: float = 0.02
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not any(self.candidates):
            raise PlanishError("auto.candidates has nothing to choose from. Give lists of steps, such as [[hadamard], [{cat: {block: 96}}]].")
        for i, candidate in enumerate(self.candidates):
            if candidate in self.candidates[:i]:
                raise PlanishError(f"auto.candidates.{i} is there twice, as {self.candidates.index(candidate)} too. Remove one.")
            narrow = next((j for j, step in enumerate(candidate) if step.sites != ("*",)), None)
            if narrow is not None:
                raise PlanishError(f"auto.candidates.{i}.{narrow}: sites is for the whole step. Set auto.sites instead.")
        if not 0 < self.held_out < 1:
            raise PlanishError(f"auto.held_out is {self.held_out}, but it is a part of the tokens, between 0 and 1. Usual: 0.25.")
        if not 0 <= self.margin < 1:
            raise PlanishError(f"auto.margin is {self.margin}, but it is a part of the error, from 0 to below 1. Usual: 0.02.")

    @property
    def tried(self) -> tuple[Candidate, ...]:
        """The candidates, nothing first."""
        return (), *(candidate for candidate in self.candidates if candidate)

    def choose(self, errors: Sequence[float], costs: Sequence[float]) -> Choice:
        """Of those `tried`, in their order. Raises PlanishError where no error is a number."""
        known = [error for error in errors if math.isfinite(error)]
        if not known:
            raise PlanishError("auto cannot choose: with every candidate the outputs hold NaN or Inf.")
        near = [i for i, error in enumerate(errors) if error <= min(known) * (1 + self.margin)]
        chosen = min(near, key=lambda i: (costs[i], errors[i]))
        return Choice(tuple(map(written, self.tried)), tuple(errors), tuple(costs), chosen)


def written(candidate: Candidate) -> str:
    """A candidate on one line, settings that are not the default's as recipes write them: shift + cat {block: 96}."""
    return " + ".join(map(_written, candidate)) or NOTHING


def _written(step: object) -> str:
    name = next(name for name, kind in INPUT_STEPS.items() if kind is type(step))
    given = {field.name: getattr(step, field.name) for field in fields(step)}  # type: ignore[arg-type]
    settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in given.items() if value != getattr(type(step)(), key))
    return f"{name} {{{settings}}}" if settings else name


def cost(chain: Chain) -> float:
    """What the chain takes at run time, in multiplications for each channel of a token: nothing < diagonals < Hadamards < blocks."""
    return sum(map(_cost, chain))


def _cost(factor: Factor) -> float:
    match factor:
        case Hadamard():
            return math.log2(factor.block) + (factor.signs_C is not None)
        case Blocks():
            return factor.matrix_KBB.shape[1]
        case Kronecker():
            return len(factor.left_AA) + len(factor.right_BB)
        case Reflection():
            return 2 * factor.basis_CR.shape[1]
    return 1  # a scale, a shift, a permutation
