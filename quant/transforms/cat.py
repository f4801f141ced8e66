"""CAT: the transform that gives input and weight the same second moments (arXiv:2603.04359), then a Hadamard to flatten both.

Rounding adds noise to x in proportion to |x|^2, alike in all directions, which the output receives as |W|^2; and the other way about. So both are
in proportion to tr(S_x) tr(S_w), which no rotation changes. Over all invertible transforms it is least where T' S_x T = T^-1 S_w T^-T. The symmetric
such T is M^(1/2), with M = S_x^-1 # S_w the geometric mean, as that solves M S_x M = S_w (R. Bhatia, "Positive Definite Matrices", 2007, chapter 4).

Shape suffixes: C channels, K blocks of B channels.
"""

import torch
from torch import Tensor

from .factors import Blocks, Chain, Hadamard, Scale
from .hadamard import hadamard_block
from .positive import common_basis, level, positive_blocks


def cat(second_x_CC: Tensor, second_w_CC: Tensor, block: int, damping: float, *, hadamard: bool = True) -> Chain:
    """`cat_blocks`, then the largest Hadamard that fits all C channels, unless hadamard is False or the width is odd (and there is none).

    Blocks of one channel are a scale, which costs less to run.
    """
    blocks = cat_blocks(second_x_CC, second_w_CC, block, damping)
    first = Scale(1 / blocks.matrix_KBB.flatten()) if block == 1 else blocks
    size = hadamard_block(len(second_x_CC))
    return (first, Hadamard(size)) if hadamard and size > 1 else (first,)


def cat_blocks(second_x_CC: Tensor, second_w_CC: Tensor, block: int, damping: float) -> Blocks:
    """T = (S_x^-1 # S_w)^(1/2) of each diagonal block, symmetric; block = C: of all at once; block = 1: a scale, that of `rms_scale` at 1.

    second_x_CC: X' X over calibration tokens, sinks left out. second_w_CC: W' W summed over all readers. Both (C, C), sums or means, of any rank:
    T's size is set by `level`. damping: what is added to the diagonal of both, relative to the mean diagonal of each block; 0.01 to 0.02 is usual.
    Returns (K, B, B) float32, computed in float64. Raises PlanishError as `positive_blocks` does.
    """
    x_KBB, w_KBB, alive_K = positive_blocks(second_x_CC, second_w_CC, block, damping)
    U_KBB, S_KB, _ = torch.linalg.svd(common_basis(x_KBB, w_KBB))  # whose polar factor (T T')^(1/2) is what is wanted, for T T' = M
    T_KBB = (U_KBB * S_KB[:, None]) @ U_KBB.mT
    return Blocks(level((T_KBB + T_KBB.mT) / 2, alive_K).to(second_x_CC.device))
