"""What a transform of a site's input is made of: a chain of invertible factors, and shifts.

A factor turns the input x (..., C), a row vector of C channels, into x T, and its readers' weight W (O, C) into W T^-T, so that the layer stays the
same: (x T) (W T^-T)' = x W'. Some are for the checkpoint's run time (planish's loader executes `on_input`), some are absorbed beforehand by what
makes the input; which is not decided here.

A factor's arithmetic is that of its tensors and its argument together: float32 or wider for float32 tensors, whatever x is; the result is as x.

Shape suffixes: C channels, O out channels, K blocks of B channels, A and B the Kronecker factors of C, R directions of a reflection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import PlanishError
from .hadamard import rotate


class Factor(Protocol):
    """One factor of a chain. kind: its name in a checkpoint; tensors and numbers make it anew, see `restore`."""

    kind: ClassVar[str]

    def on_input(self, x: Tensor) -> Tensor:
        """x T: (..., C), in x's dtype."""
        ...

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W T^-T: (O, C), in w's dtype."""
        ...

    def offset(self, w_OC: Tensor) -> Tensor | None:
        """What the layer's bias gains: (O,), None if nothing. w_OC: the weight before on_weight."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Those that on_input needs."""
        ...

    def numbers(self) -> dict[str, int]:
        """Likewise."""
        ...


class _Linear:
    """Of a factor without a shift."""

    __slots__ = ()

    def offset(self, w_OC: Tensor) -> Tensor | None:
        """None."""
        return None

    def numbers(self) -> dict[str, int]:
        """None."""
        return {}


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, like.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Scale(_Linear):
    """x / divisor_C, divisor positive."""

    divisor_C: Tensor
    kind: ClassVar[str] = "scale"

    def on_input(self, x: Tensor) -> Tensor:
        """x / divisor."""
        return (_wide(x, self.divisor_C) / self.divisor_C).to(x.dtype)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W * divisor."""
        return (_wide(w_OC, self.divisor_C) * self.divisor_C).to(w_OC.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """divisor."""
        return {"divisor": self.divisor_C}


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """x - center_C: what is taken from the input comes back by the readers' biases."""

    center_C: Tensor
    kind: ClassVar[str] = "shift"

    def on_input(self, x: Tensor) -> Tensor:
        """x - center."""
        return (_wide(x, self.center_C) - self.center_C).to(x.dtype)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W."""
        return w_OC

    def offset(self, w_OC: Tensor) -> Tensor | None:
        """W center."""
        wide_OC = _wide(w_OC, self.center_C)
        return wide_OC @ self.center_C.to(wide_OC.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """center."""
        return {"center": self.center_C}

    def numbers(self) -> dict[str, int]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True, eq=False)
class Permutation(_Linear):
    """x[index_C]: channel c of the result is channel index_C[c] of x. int64."""

    index_C: Tensor
    kind: ClassVar[str] = "permutation"

    def on_input(self, x: Tensor) -> Tensor:
        """x[..., index]."""
        return x[..., self.index_C]

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W[:, index]."""
        return w_OC[:, self.index_C]

    def tensors(self) -> dict[str, Tensor]:
        """index."""
        return {"index": self.index_C}


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(_Linear):
    """(x * signs_C) H with H block-diagonal of `block` channels each; signs_C of 1 and -1, or None. Orthogonal."""

    block: int
    signs_C: Tensor | None = None
    kind: ClassVar[str] = "hadamard"

    def on_input(self, x: Tensor) -> Tensor:
        """(x * signs) H."""
        return rotate(x if self.signs_C is None else x * self.signs_C.to(x.dtype), self.block)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """(W * signs) H."""
        return self.on_input(w_OC)

    def tensors(self) -> dict[str, Tensor]:
        """signs, if any."""
        return {} if self.signs_C is None else {"signs": self.signs_C}

    def numbers(self) -> dict[str, int]:
        """block."""
        return {"block": self.block}


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(_Linear):
    """x times a block-diagonal matrix: block k of x times matrix_KBB[k]; K = 1: the same matrix for every block. K = 1 and B = C: any matrix."""

    matrix_KBB: Tensor
    kind: ClassVar[str] = "blocks"

    def on_input(self, x: Tensor) -> Tensor:
        """x M."""
        return self._times(x, self.matrix_KBB)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W M^-T, by a solver in float64."""
        return self._times(w_OC, torch.linalg.inv(self.matrix_KBB.double()).mT)

    def _times(self, x: Tensor, matrix_KBB: Tensor) -> Tensor:
        count, size = matrix_KBB.shape[0], matrix_KBB.shape[1]
        wide = _wide(x, matrix_KBB)
        if count == 1:
            return (wide.reshape(-1, size) @ matrix_KBB[0].to(wide.dtype)).reshape(x.shape).to(x.dtype)
        parts_KTB = wide.reshape(-1, count, size).transpose(0, 1)
        return (parts_KTB @ matrix_KBB.to(wide.dtype)).transpose(0, 1).reshape(x.shape).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """matrix."""
        return {"matrix": self.matrix_KBB}


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(_Linear):
    """x (left_AA ⊗ right_BB), that is left' X right with x as X (A, B)."""

    left_AA: Tensor
    right_BB: Tensor
    kind: ClassVar[str] = "kronecker"

    def on_input(self, x: Tensor) -> Tensor:
        """x (left ⊗ right)."""
        return self._times(x, self.left_AA, self.right_BB)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W (left ⊗ right)^-T, by a solver in float64."""
        return self._times(w_OC, torch.linalg.inv(self.left_AA.double()).mT, torch.linalg.inv(self.right_BB.double()).mT)

    @staticmethod
    def _times(x: Tensor, left_AA: Tensor, right_BB: Tensor) -> Tensor:
        wide = _wide(_wide(x, left_AA), right_BB)
        x_TAB = wide.reshape(-1, len(left_AA), len(right_BB))
        return (left_AA.to(wide.dtype).T @ x_TAB @ right_BB.to(wide.dtype)).reshape(x.shape).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """left and right."""
        return {"left": self.left_AA, "right": self.right_BB}


@dataclass(frozen=True, slots=True, eq=False)
class Reflection(_Linear):
    """x (I - B B'): where B' B = 2 I, a reflection in R directions at once, orthogonal. Two thin products instead of one by C by C. basis_CR: B."""

    basis_CR: Tensor
    kind: ClassVar[str] = "reflection"

    def on_input(self, x: Tensor) -> Tensor:
        """x - x B B'."""
        wide = _wide(x, self.basis_CR)
        basis_CR = self.basis_CR.to(wide.dtype)
        return (wide - wide @ basis_CR @ basis_CR.T).to(x.dtype)

    def on_weight(self, w_OC: Tensor) -> Tensor:
        """W (I - B B')^-1 = W + W B (I - B' B)^-1 B', in float64: B as it is stored is not quite a reflection's."""
        basis_CR, wide_OC = self.basis_CR.double(), w_OC.double()
        inner_RR = torch.eye(basis_CR.shape[1], dtype=torch.float64, device=basis_CR.device) - basis_CR.T @ basis_CR
        solved_RC: Tensor = torch.linalg.solve(inner_RR, basis_CR.T)
        return (wide_OC + wide_OC @ basis_CR @ solved_RC).to(w_OC.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """basis."""
        return {"basis": self.basis_CR}


Chain = tuple[Factor, ...]
"""Factors in the order in which the input meets them."""


def on_input(chain: Chain, x: Tensor) -> Tensor:
    """x through the whole chain: (..., C), in x's dtype."""
    for factor in chain:
        x = factor.on_input(x)
    return x


def on_weight(chain: Chain, w_OC: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight that goes with the transformed input, (O, C) in w's dtype, and what the bias gains, (O,), if anything."""
    offset_O: Tensor | None = None
    for factor in chain:
        gain_O = factor.offset(w_OC)
        if gain_O is not None:
            offset_O = gain_O if offset_O is None else offset_O + gain_O
        w_OC = factor.on_weight(w_OC)
    return w_OC, offset_O


def store(chain: Chain) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """What a checkpoint holds of a chain: each factor's kind and numbers, and tensors under names such as 0.matrix."""
    described: list[dict[str, object]] = [{"kind": factor.kind, **factor.numbers()} for factor in chain]
    tensors = {f"{i}.{name}": tensor for i, factor in enumerate(chain) for name, tensor in factor.tensors().items()}
    return described, tensors


def restore(described: Sequence[Mapping[str, object]], tensors: Mapping[str, Tensor]) -> Chain:
    """The chain that `store` took apart. Raises PlanishError: a kind that this version does not know, a tensor or number that is missing."""
    chain: list[Factor] = []
    for i, what in enumerate(described):
        mine = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(i)}
        chain.append(_restore(what, mine))
    return tuple(chain)


def placed(chain: Chain, device: torch.device) -> Chain:
    """The chain with its tensors on that device."""
    described, tensors = store(chain)
    return restore(described, {name: tensor.to(device) for name, tensor in tensors.items()})


def _restore(what: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Factor:
    block = what.get("block")
    match what.get("kind"), sorted(tensors):
        case "scale", ["divisor"]:
            return Scale(tensors["divisor"])
        case "shift", ["center"]:
            return Shift(tensors["center"])
        case "permutation", ["index"]:
            return Permutation(tensors["index"])
        case "hadamard", ([] | ["signs"]) if isinstance(block, int):
            return Hadamard(block, tensors.get("signs"))
        case "blocks", ["matrix"]:
            return Blocks(tensors["matrix"])
        case "reflection", ["basis"]:
            return Reflection(tensors["basis"])
        case "kronecker", ["left", "right"]:
            return Kronecker(tensors["left"], tensors["right"])
    raise PlanishError(
        f"a transform {dict(what)} with tensors {sorted(tensors)} is unknown to this version of planish. Use the version that wrote it."
    )


def rounded(chain: Chain, dtype: torch.dtype) -> Chain:
    """The chain with matrices, divisors and centers as they will be stored in dtype, each still in its own: so weights are made for what will run."""
    described, tensors = store(chain)
    return restore(described, {name: tensor.to(dtype).to(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
