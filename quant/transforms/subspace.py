"""Principal subspaces that are kept at more bits: ResQ's basis, and QUAD's widened one.

ResQ (Saxena et al. 2024, arXiv:2412.14363): an orthogonal basis whose first R channels span the R directions in which the inputs are largest, to be
kept at 8 bits; both parts are rotated inside themselves, so that in neither a channel sticks out.
QUAD (Hu et al. 2025, arXiv:2503.19353): the stream is widened by R channels, x -> x Q, Q = [P, I - P P'], P the top eigenvectors; Q Q' = I, so
readers W become W Q and writers Q' W. The first R channels, in full precision, hold all of x in the subspace, the others what is outside it.

`reflected` has the same first channels by a reflection, which costs 2 C R at run time and C R in a checkpoint where a basis costs C².

All is computed in float64; matrices are float32.

Shape suffixes: C channels, R channels of the subspace, S = C + R of the widened stream, n width.
"""

import math

import torch
from torch import Tensor

from ..errors import PlanishError
from .factors import Blocks, Chain, Hadamard, Reflection
from .hadamard import hadamard, hadamard_block
from .rotation import random_signs


def principal(second_CC: Tensor, rank: int, seed: int = 0) -> Blocks:
    """The basis of ResQ as a factor: x M, M orthogonal (C, C), whose first `rank` channels span the top eigenvectors of second_CC (sum of x' x).

    Each part is mixed by a Hadamard matrix with random signs, after which all its channels have the same mean square; by a random rotation where
    its width has no Hadamard matrix. Raises PlanishError unless 1 <= rank < C.
    """
    basis_CC = _eigenvectors(second_CC, rank)
    generator = torch.Generator().manual_seed(seed)
    parts = [part @ _mixing(part.shape[1], generator).to(part.device) for part in (basis_CC[:, :rank], basis_CC[:, rank:])]
    return Blocks(torch.cat(parts, dim=1).float()[None])


def reflected(second_CC: Tensor, rank: int, seed: int = 0) -> Chain:
    """A reflection after which the first `rank` channels span the top eigenvectors of second_CC (sum of x' x), then a Hadamard inside each part.

    P (C, R): these eigenvectors; S Z: the polar form of its first R rows, S positive semidefinite; E: the first R columns of I. Then D = P Z' + E has
    D' D = 2 (I + S), so B = D (I + S)^(-1/2) is a reflection's (B' B = 2 I), and the first R channels are those of E - B B' E = -P Z'
    (R. Schreiber, B. Parlett, "Block reflectors", 1988). The Hadamard has the largest blocks that both parts' widths allow.
    Raises PlanishError unless 1 <= rank < C.
    """
    P_CR = _eigenvectors(second_CC, rank)[:, :rank]
    U_RR, M_R, V_RR = torch.linalg.svd(P_CR[:rank])
    D_CR = P_CR @ (U_RR @ V_RR).T
    D_CR[:rank].diagonal().add_(1)
    B_CR = D_CR @ (U_RR / (1 + M_R).sqrt()) @ U_RR.T
    channels = len(second_CC)
    block = hadamard_block(math.gcd(rank, channels))
    mixing = (Hadamard(block, random_signs(channels, seed).to(second_CC.device)),) if block > 1 else ()
    return (Reflection(B_CR.float()), *mixing)


def widened(second_CC: Tensor, rank: int, seed: int = 0) -> Tensor:
    """QUAD's Q = [P H_R, (I - P P') H_C]: (C, S) float32, Q Q' = I, H random mixings as in `principal`.

    Norms are kept, |x Q| = |x|, but the stream is wider: an RMSNorm's mean square must divide by C, not by S. See `widened_norm`.
    """
    P_CR = _eigenvectors(second_CC, rank)[:, :rank]
    generator = torch.Generator().manual_seed(seed)
    inside_CR = P_CR @ _mixing(rank, generator).to(P_CR.device)
    outside_CC = torch.eye(len(P_CR), dtype=P_CR.dtype, device=P_CR.device) - P_CR @ P_CR.T
    return torch.cat([inside_CR, outside_CC @ _mixing(len(P_CR), generator).to(P_CR.device)], dim=1).float()


def widened_norm(channels: int, rank: int, eps: float) -> tuple[float, float]:
    """Weight and eps with which a stock RMSNorm over S = channels + rank values computes what the weightless one over `channels` did.

    A stock norm divides by sqrt(sum x² / S + eps'), which is too small by sqrt(C / S); eps' = eps C / S and the weight sqrt(C / S) undo that exactly:
    x sqrt(C / S) / sqrt(sum x² / S + eps C / S) = x / sqrt(sum x² / C + eps).
    """
    share = channels / (channels + rank)
    return share**0.5, eps * share


def _eigenvectors(second_CC: Tensor, rank: int) -> Tensor:
    """All eigenvectors in float64, the largest first, each with its largest entry positive."""
    if not 1 <= rank < len(second_CC):
        raise PlanishError(f"A subspace of rank {rank} for {len(second_CC)} channels, but the rank is 1 to {len(second_CC) - 1}. Usual: an eighth.")
    if not second_CC.isfinite().all():
        raise PlanishError("the second moment of a layer's inputs holds NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    basis_CC: Tensor = torch.linalg.eigh(second_CC.double()).eigenvectors.flip(1)
    largest_1C = basis_CC.gather(0, basis_CC.abs().argmax(0, keepdim=True))
    return basis_CC * largest_1C.sign()


def _mixing(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal (n, n): Hadamard with random signs where there is one, else of the QR decomposition of a Gaussian. float64."""
    if hadamard_block(n) == n:
        signs_n = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return signs_n[:, None] * hadamard(n)
    Q_nn, R_nn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    rotation_nn: Tensor = Q_nn * R_nn.diagonal().sign()
    return rotation_nn
