"""The step `rotate`: rotations that are absorbed by weights, or act across heads at run time.

(QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; SpinQuant, Liu et al. 2024, arXiv:2405.16406, section 3.)
A LayerNorm takes the mean of its input away. With Q 1 = 1 the mean of x Q is that of x, and LayerNorm(x Q) = LayerNorm(x) Q: it stays a LayerNorm.

Shape suffixes: n width, A heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from .factors import Blocks, Chain, Hadamard, Kronecker
from .hadamard import hadamard, hadamard_block
from .hadamard import rotate as times_hadamard
from .inputs import SiteView
from .learned import Objective
from .rotation import orthonormal, random_orthogonal, random_signs

Kind = Literal["hadamard", "orthogonal", "learned"]


@dataclass(frozen=True, slots=True)
class Learning:
    """How a rotation is learned. objective: see learned.py. steps: of the descent. tokens: of a site's inputs, drawn in proportion to what noise in
    them costs, from text of half as many tokens."""

    objective: Objective = "range"
    steps: int = 200
    tokens: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotate:
    """at residual: the whole stream, one rotation for all blocks (R1; needs fold_norms before it). at value: each head's values, absorbed by the rows
    of v and the columns of o (R2). at heads: across the heads at the input of o, at run time (with at value: a rotation of all channels). at keys:
    every head's queries and keys behind RoPE, at run time (R3), so that keys lose less in a cache of few bits (quant/key_values.py).

    kind: hadamard, with random signs but across heads; a random orthogonal matrix; or, at residual and value, learned: from the hadamard on, what is
    quantized is made as flat as can be (learned.py); at value one for each key-value head of each block. A minute or two for 576 channels.
    seeds, at residual: so many draws are compared, and the one is kept with which the tokens of the normed stream have the least range.
    objective, steps, tokens: of a rotation that is learned, see `Learning`; null: its defaults.
    """

    at: Literal["residual", "value", "heads", "keys"]
    kind: Kind = "hadamard"
    seeds: int = 1
    objective: Objective | None = None
    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise PlanishError(f"rotate.seeds is {self.seeds}, but it counts draws: 1, or more for a choice.")
        if self.kind == "learned":
            self._check_learned()
        for name in ("objective", "steps", "tokens"):
            if self.kind != "learned" and getattr(self, name) is not None:
                raise PlanishError(f"rotate.{name} is {getattr(self, name)}, but a rotation of kind {self.kind} has none. Set kind: learned.")
        if self.at == "keys" and self.kind != "hadamard":
            raise PlanishError(f"rotate.kind is {self.kind}, but queries and keys are turned by a Hadamard. Leave kind out at keys.")
        if self.seeds > 1 and self.at != "residual":
            raise PlanishError(f"rotate.seeds is {self.seeds}, but only at residual are draws compared. Leave it out at {self.at}.")

    def _check_learned(self) -> None:
        if self.at == "heads" or self.seeds > 1:
            raise PlanishError(
                "rotate.kind is learned, which is for one draw at residual or value. Use hadamard or orthogonal elsewhere, and leave seeds out."
            )
        for name, value in (("steps", self.steps), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise PlanishError(f"rotate.{name} is {value}, but must be at least 1. Leave it out for the usual number.")

    @property
    def learning(self) -> Learning:
        """How it is learned."""
        usual = Learning()
        return Learning(self.objective or usual.objective, self.steps or usual.steps, self.tokens or usual.tokens)


def mixing(n: int, kind: Kind, seed: int) -> Chain:
    """An orthogonal matrix of n channels, in float64. hadamard: with random signs; where there is none for n, its largest blocks, which a random
    orthogonal matrix then mixes."""
    if kind == "orthogonal":
        return (Blocks(random_orthogonal(n, seed)[None]),)
    block = hadamard_block(n)
    blocks = Hadamard(block, random_signs(n, seed))
    return (blocks,) if block == n else (blocks, Kronecker(random_orthogonal(n // block, seed).contiguous(), torch.eye(block, dtype=torch.float64)))


def mean_keeping(n: int, kind: Kind, seed: int) -> Chain:
    """An orthogonal Q with Q 1 = 1 and, Q being orthogonal, Q' 1 = 1: one matrix in float64.

    Q = A B' with A and B orthogonal, the first column of both 1 / sqrt(n). orthogonal: A and B random, so Q is uniform among such matrices.
    hadamard: A = K ⊗ H, H the largest Hadamard matrix that fits, its rows' signs such that its first column is positive; B = A diag(1, random signs).
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        A_nn, B_nn = _constant_first(n, generator), _constant_first(n, generator)
    else:
        block = hadamard_block(n)
        H_bb = hadamard(block)
        A_nn = torch.kron(_constant_first(n // block, generator), H_bb * H_bb[:, :1].sign())
        signs_n = random_signs(n, seed).double()
        signs_n[0] = 1
        B_nn = A_nn * signs_n
    return (Blocks((A_nn @ B_nn.T)[None]),)


def _constant_first(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose first column is 1 / sqrt(n): (n, n) float64."""
    return orthonormal(
        torch.cat([torch.ones(n, 1, dtype=torch.float64), torch.randn(n, n - 1, generator=generator, dtype=torch.float64)], 1)
    ).contiguous()


def turned_back(chain: Chain, x: Tensor) -> Tensor:
    """x Q' for a chain of orthogonal factors, as `mixing` and `mean_keeping` make them: (..., n) in x's dtype."""
    for factor in reversed(chain):
        match factor:
            case Hadamard():
                x = times_hadamard(x, factor.block, inverse=True)
                x = x if factor.signs_C is None else x * factor.signs_C.to(x)
            case Blocks():
                x = Blocks(factor.matrix_KBB.mT.to(x.device)).on_input(x)
            case Kronecker():
                x = Kronecker(factor.left_AA.T.to(x.device), factor.right_BB.T.to(x.device)).on_input(x)
            case _:
                raise TypeError(f"{factor.kind} is no rotation")
    return x


@dataclass(frozen=True, slots=True, eq=False)
class AcrossHeads:
    """The rotation across heads at the input of o: left_AA ⊗ I."""

    left_AA: Tensor
    sites: tuple[str, ...] = ("*.o",)

    def chain(self, view: SiteView) -> Chain:
        """One factor."""
        size = len(view.mean_C) // len(self.left_AA)
        return (Kronecker(self.left_AA.to(view.sample_TC), torch.eye(size).to(view.sample_TC)),)


def across_heads(step: Rotate, heads: int) -> AcrossHeads:
    """What the step does in a model of so many query heads. PlanishError where there is no Hadamard matrix of that order."""
    if step.kind == "orthogonal":
        return AcrossHeads(random_orthogonal(heads, 0))
    if hadamard_block(heads) != heads:
        raise PlanishError(
            f"rotate at heads: the model has {heads} heads, and there is no Hadamard matrix of that order. "
            "Use kind: orthogonal, or leave the step out."
        )
    return AcrossHeads(hadamard(heads))


def rotation_at(steps: Sequence[object], at: str) -> Rotate | None:
    """The step that rotates there, if any."""
    return next((step for step in steps if isinstance(step, Rotate) and step.at == at), None)
