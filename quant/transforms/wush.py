"""WUSH: input and weight given the same second moments in their common eigenbasis, then flattened by a Hadamard (Chen et al., arXiv:2512.00956).

There both are diagonal, say S, so after a Hadamard both are H' S H, whose diagonal is constant: where CAT leaves to chance how the Hadamard meets the
spectrum, here every channel has the same energy, in the input and in the weight.

Shape suffixes: C channels, K blocks of B channels.
"""

import torch
from torch import Tensor

from .factors import Blocks
from .hadamard import hadamard_block, rotate
from .permute import zigzag
from .positive import common_basis, level, positive_blocks


def wush_blocks(second_x_CC: Tensor, second_w_CC: Tensor, block: int, damping: float, *, hadamard: bool = True) -> Blocks:
    """T of each diagonal block. The arguments and what is returned are those of `cat_blocks`.

    hadamard: whether H ends each block; False where one over all blocks follows, as a factor of its own. Where there is no Hadamard of a block's
    size, H is made of the largest that it divides into, and the eigenvalues are dealt to them so that their energies are about the same.
    """
    x_KBB, w_KBB, alive_K = positive_blocks(second_x_CC, second_w_CC, block, damping)
    T_KBB = common_basis(x_KBB, w_KBB)
    if hadamard:
        size = hadamard_block(block)
        falling_B = torch.arange(block, 0, -1, device=T_KBB.device)
        T_KBB = rotate(T_KBB[..., zigzag(falling_B, block // size)], size)
    return Blocks(level(T_KBB, alive_K).to(second_x_CC.device))
