"""The shapes that a learned transform can have (flat.py), as numbers that descent can change, all 0 at the start.

kronecker: x / d (L ⊗ R), the factors as nearly alike as can be, d a divisor of every channel. blocks: x M H, M block-diagonal, H a Hadamard.

Starts: identity; hadamard: L and R mixings (rotate.mixing), H behind blocks; cat: CAT (cat.py) before these: of blocks, or of every channel alone and
then of each factor of the product, on the moments summed over the other.

Factors are L (I + dL), R (I + dR) and M (I + dM), the divisor is d exp(-log c).

Shape suffixes: T tokens, C channels, K blocks of B channels, A and B the Kronecker factors.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..descent import Group
from .cat import cat_blocks
from .factors import Blocks, Chain, Hadamard, Kronecker, Scale, on_input, placed
from .hadamard import hadamard_block
from .inputs import SiteView, divisor
from .rotate import mixing

Start = Literal["cat", "hadamard", "identity"]
SCALE_RATE = 0.1  # of the lr: the step of a channel's log c


class Shape(Protocol):
    """A transform as front and then `chains`, which alone changes."""

    @property
    def front(self) -> Chain:
        """What stays as it is, and comes first."""
        ...

    def groups(self, lr: float) -> list[Group]:
        """The numbers to change, with steps by which an axis moves lr of its length."""
        ...

    def chains(self) -> tuple[Chain, Chain]:
        """Behind the front, differentiable: what the input goes through, and what the weight does, both by on_input."""
        ...

    def chain(self) -> Chain:
        """All of it as it stands, in as few factors as can be."""
        ...


@dataclass(slots=True, eq=False)
class BlockShape:
    """Blocks, then a Hadamard."""

    front: Chain
    back: Chain
    change_KBB: Tensor

    @classmethod
    def of(cls, view: SiteView, start: Start, damping: float, block: int) -> "BlockShape":
        """At its start. block: a divisor of the width."""
        width = len(view.second_CC)
        change_KBB = torch.zeros(width // block, block, block, device=view.second_CC.device)
        eye_KBB = torch.eye(block, device=change_KBB.device).expand_as(change_KBB).contiguous()
        front = cat_blocks(view.second_CC, view.readers_CC, block, damping) if start == "cat" else Blocks(eye_KBB)
        back = () if start == "identity" or hadamard_block(width) == 1 else (Hadamard(hadamard_block(width)),)
        return cls((front,), back, change_KBB.requires_grad_())

    def groups(self, lr: float) -> list[Group]:
        """One."""
        return [([self.change_KBB], lr / math.sqrt(self.change_KBB.shape[1]))]

    def chains(self) -> tuple[Chain, Chain]:
        """I + dM and its inverse."""
        moved_KBB = _moved(self.change_KBB)
        return (Blocks(moved_KBB), *self.back), (Blocks(_inverse(moved_KBB).mT), *self.back)

    def chain(self) -> Chain:
        """M (I + dM), H."""
        (front,) = self.front
        assert isinstance(front, Blocks)
        return (Blocks((front.matrix_KBB.double() @ _moved(self.change_KBB.detach().double())).float()), *self.back)


@dataclass(slots=True, eq=False)
class KroneckerShape:
    """A divisor, then a Kronecker product."""

    front: Chain
    left_AA: Tensor
    right_BB: Tensor
    change_AA: Tensor
    change_BB: Tensor
    log_C: Tensor

    @classmethod
    def of(cls, view: SiteView, start: Start, damping: float, seed: int) -> "KroneckerShape":
        """At its start. seed: of the mixings' signs."""
        width, device = len(view.second_CC), view.second_CC.device
        sizes = (small := divisor(width, math.isqrt(width)), width // small)
        front = Scale(torch.ones(width, device=device))
        factors = [torch.eye(size, device=device) for size in sizes]
        if start == "cat":
            front = Scale(1 / cat_blocks(view.second_CC, view.readers_CC, 1, damping).matrix_KBB.flatten())
            factors = _cat_factors(view.through((front,)), sizes, damping)
        if start != "identity":
            factors = [on_input(placed(mixing(len(factor), "hadamard", seed), device), factor) for factor in factors]
        changes = [torch.zeros_like(part).requires_grad_() for part in (*factors, front.divisor_C)]
        return cls((front,), factors[0], factors[1], *changes)

    def groups(self, lr: float) -> list[Group]:
        """The factors and the divisor."""
        factors = [([change], lr / math.sqrt(len(change))) for change in (self.change_AA, self.change_BB)]
        return [*factors, ([self.log_C], lr * SCALE_RATE)]

    def chains(self) -> tuple[Chain, Chain]:
        """c, then L (I + dL) ⊗ R (I + dR); and their inverses."""
        left_AA, right_BB = self.left_AA @ _moved(self.change_AA), self.right_BB @ _moved(self.change_BB)
        c_C = self.log_C.exp()
        return (Scale(1 / c_C), Kronecker(left_AA, right_BB)), (Scale(c_C), Kronecker(_inverse(left_AA).mT, _inverse(right_BB).mT))

    def chain(self) -> Chain:
        """d / c, L (I + dL) ⊗ R (I + dR)."""
        (front,) = self.front
        assert isinstance(front, Scale)
        left_AA, right_BB = (
            (start.double() @ _moved(change.detach().double())).float()
            for start, change in ((self.left_AA, self.change_AA), (self.right_BB, self.change_BB))
        )
        return Scale(front.divisor_C * (-self.log_C.detach()).exp()), Kronecker(left_AA, right_BB)


def _moved(change: Tensor) -> Tensor:
    return change + torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)


def _inverse(matrix: Tensor) -> Tensor:
    """Not a number where there is none: such a step is never judged the best."""
    inverse: Tensor = torch.linalg.inv_ex(matrix).inverse
    return inverse


def _cat_factors(view: SiteView, sizes: tuple[int, int], damping: float) -> list[Tensor]:
    """CAT of the left factor, on moments summed over the right one's channels, then of the right one behind it."""
    left_AA = cat_blocks(_summed(view.second_CC, sizes, 1), _summed(view.readers_CC, sizes, 1), sizes[0], damping).matrix_KBB[0]
    view = view.through((Kronecker(left_AA, torch.eye(sizes[1]).to(left_AA)),))
    return [left_AA, cat_blocks(_summed(view.second_CC, sizes, 0), _summed(view.readers_CC, sizes, 0), sizes[1], damping).matrix_KBB[0]]


def _summed(second_CC: Tensor, sizes: tuple[int, int], over: int) -> Tensor:
    """Of moments of the factors' product, those of the other factor."""
    return second_CC.reshape(*sizes, *sizes).diagonal(dim1=over, dim2=over + 2).sum(-1)
