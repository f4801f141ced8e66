"""Principal subspaces that are kept at more bits, as in ResQ and QUAD.

ResQ (Saxena et al. 2024, arXiv:2412.14363): an orthogonal basis whose first R channels span the R directions in which the inputs are largest, to be
kept at 8 bits; both parts are rotated inside themselves, so that in neither a channel sticks out.
QUAD (Hu et al. 2025, arXiv:2503.19353): the stream is widened by R channels, x -> x Q, Q = [P, I - P P'], P the top eigenvectors; Q Q' = I, so
readers W become W Q and writers Q' W. The first R channels, in full precision, hold all of x in the subspace, the others what is outside it.

Here both have their first channels by a reflection, which costs 2 C R at run time and C R in a checkpoint where a basis costs C².

All is computed in float64; matrices are float32.

Shape suffixes: C channels, R channels of the subspace.
"""

import math

import torch
from torch import Tensor

from ..errors import PlanishError
from .factors import Chain, Hadamard, Reflection
from .hadamard import hadamard_block
from .rotation import random_signs


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


def _eigenvectors(second_CC: Tensor, rank: int) -> Tensor:
    """All eigenvectors in float64, the largest first, each with its largest entry positive."""
    if not 1 <= rank < len(second_CC):
        raise PlanishError(f"A subspace of rank {rank} for {len(second_CC)} channels, but the rank is 1 to {len(second_CC) - 1}. Usual: an eighth.")
    if not second_CC.isfinite().all():
        raise PlanishError("the second moment of a layer's inputs holds NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    basis_CC: Tensor = torch.linalg.eigh(second_CC.double()).eigenvectors.flip(1)
    largest_1C = basis_CC.gather(0, basis_CC.abs().argmax(0, keepdim=True))
    return basis_CC * largest_1C.sign()
