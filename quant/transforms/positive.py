"""What transforms from second moments share: diagonal blocks that are positive definite whatever calibration delivered, and the basis in which the
moments of input and weight are the same.

Blocks lie on the CPU, whatever device the moments are on: a GPU factors such small matrices one after the other, in hundreds of launches each.

Shape suffixes: C channels, K blocks of B channels.
"""

import torch
from torch import Tensor

from ..errors import PlanishError

FLOOR = torch.finfo(torch.float32).eps
"""Eigenvalues below this share of a block's greatest are raised to it: moments are summed, and transforms stored, in float32, which cannot tell them
from rounding."""


def positive_blocks(second_x_CC: Tensor, second_w_CC: Tensor, block: int, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonal blocks of both, each with damping times its mean diagonal added to its diagonal: two of (K, B, B) float64; and alive_K, bool; all
    on the CPU.

    A block that is all zero in one of them has nothing to say: it is the identity in both, and not alive.
    Raises PlanishError: a block that does not divide C, moments of other shapes, NaN or Inf.
    """
    channels = len(second_x_CC)
    if block < 1 or channels % block:
        raise PlanishError(f"A transform of {channels} channels cannot have blocks of {block}. Choose a divisor of {channels}.")
    x_KBB, w_KBB = _diagonal_blocks("input", second_x_CC, channels, block), _diagonal_blocks("weights", second_w_CC, channels, block)
    mean_x_K, mean_w_K = (moments.diagonal(dim1=1, dim2=2).mean(1) for moments in (x_KBB, w_KBB))
    alive_K = (mean_x_K > 0) & (mean_w_K > 0)
    eye_BB = torch.eye(block, dtype=torch.float64, device="cpu")
    damped = (moments + damping * mean_K[:, None, None] * eye_BB for moments, mean_K in ((x_KBB, mean_x_K), (w_KBB, mean_w_K)))
    x_KBB, w_KBB = (torch.where(alive_K[:, None, None], moments, eye_BB) for moments in damped)
    return x_KBB, w_KBB, alive_K


def _diagonal_blocks(of: str, second_CC: Tensor, channels: int, block: int) -> Tensor:
    if second_CC.shape != (channels, channels):
        raise PlanishError(f"second moments of the {of} have shape {tuple(second_CC.shape)}, but should be ({channels}, {channels}).")
    blocks_KBB = second_CC.reshape(-1, block, channels // block, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).cpu().double()
    if not blocks_KBB.isfinite().all():
        raise PlanishError(f"second moments of the {of} hold NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    return (blocks_KBB + blocks_KBB.mT) / 2


def common_basis(x_KBB: Tensor, w_KBB: Tensor) -> Tensor:
    """T with T' S_x T = T^-1 S_w T^-T, diagonal and falling: (K, B, B), for positive definite S_x and S_w.

    With any roots S_x = X X' and S_w = Y Y', and Y' X = U S V', it is T = Y U S^(-1/2), and both moments become S (arXiv:2512.00956).
    """
    root_w_KBB = _root(w_KBB)
    U_KBB, S_KB, _ = torch.linalg.svd(root_w_KBB.mT @ _root(x_KBB))
    T_KBB: Tensor = root_w_KBB @ (U_KBB / S_KB[:, None].sqrt())
    return T_KBB


def _root(S_KBB: Tensor) -> Tensor:
    """R with R R' = S, but for eigenvalues that are raised to FLOOR."""
    values_KB, vectors_KBB = torch.linalg.eigh(S_KBB)
    root_KBB: Tensor = vectors_KBB * values_KB.clamp(min=FLOOR * values_KB[:, -1:]).sqrt()[:, None]
    return root_KBB


def level(T_KBB: Tensor, alive_K: Tensor) -> Tensor:
    """The identity for blocks that are not alive; the others divided by one number, so that the geometric mean of their determinants is 1 and a site
    keeps its overall size. float32, (K, B, B)."""
    if alive_K.any():
        log_K = torch.linalg.slogdet(T_KBB[alive_K]).logabsdet / T_KBB.shape[-1]
        T_KBB = T_KBB * (-log_K.mean()).exp()
    eye_BB = torch.eye(T_KBB.shape[-1], dtype=T_KBB.dtype, device=T_KBB.device)
    return torch.where(alive_K[:, None, None], T_KBB, eye_BB).float().contiguous()
