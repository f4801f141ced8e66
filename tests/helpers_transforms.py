"""Dense matrices of factors, written out entry by entry, and inputs with outliers: what tests of transforms share.

Shape suffixes: T tokens, C channels, O out channels.
"""

import torch
from torch import Tensor

from planish.quant.transforms.factors import Blocks, Chain, Factor, Hadamard, Kronecker, Permutation, Reflection, Scale, Shift, on_input, on_weight
from planish.quant.transforms.hadamard import hadamard


def dense(factor: Factor, channels: int) -> Tensor:
    """T of x -> x T (for a Shift, the identity): (C, C) in float64."""
    match factor:
        case Scale():
            return torch.diag(1 / factor.divisor_C.double())
        case Shift():
            return torch.eye(channels, dtype=torch.float64)
        case Permutation():
            T_CC = torch.zeros(channels, channels, dtype=torch.float64)
            for to, source in enumerate(factor.index_C.tolist()):
                T_CC[source, to] = 1
            return T_CC
        case Hadamard():
            signs_C = torch.ones(channels) if factor.signs_C is None else factor.signs_C
            return torch.diag(signs_C.double()) @ torch.block_diag(*[hadamard(factor.block)] * (channels // factor.block))
        case Blocks():
            blocks = list(factor.matrix_KBB.double())
            return torch.block_diag(*(blocks * (channels // len(blocks[0])) if len(blocks) == 1 else blocks))
        case Reflection():
            return torch.eye(channels, dtype=torch.float64) - factor.basis_CR.double() @ factor.basis_CR.double().T
        case Kronecker():
            return torch.kron(factor.left_AA.double(), factor.right_BB.double())
    raise AssertionError(factor)


def dense_chain(chain: Chain, channels: int) -> Tensor:
    """The product of all: (C, C) in float64."""
    T_CC = torch.eye(channels, dtype=torch.float64)
    for factor in chain:
        T_CC = T_CC @ dense(factor, channels)
    return T_CC


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a few channels up to 50 times as large and an offset: (tokens, channels) float64."""
    size_C = 1 + 49 * (normal(channels, seed=seed + 1) > 1.5)
    return (normal(tokens, channels, seed=seed) @ (torch.eye(channels) + normal(channels, channels, seed=seed + 2) / channels**0.5) + 0.3) * size_C


def second(x_TC: Tensor) -> Tensor:
    """X' X."""
    return x_TC.T @ x_TC


def assert_layer_stays(chain: Chain, channels: int, tolerance: float = 1e-9) -> None:
    """(x T)(W T^-T)' + offset == x W' in float64, for inputs and a weight of these channels."""
    x_TC, w_OC = outliers(7, channels, seed=3), normal(5, channels, seed=4)
    moved_OC, offset_O = on_weight(chain, w_OC)
    found_TO = on_input(chain, x_TC) @ moved_OC.T + (0 if offset_O is None else offset_O)
    torch.testing.assert_close(found_TO, x_TC @ w_OC.T, rtol=0, atol=tolerance * float((x_TC.abs() @ w_OC.abs().T).max()))
