"""DuQuant: greedy block rotations and a zigzag permutation between them (Lin et al. 2024, arXiv:2406.01721, section 3, algorithm 1).

A step takes the channel with the greatest value and rotates it onto all channels of its block alike: R_d = E R E, where E swaps channels 0 and d, and
row 0 of R is 1 / sqrt(B) throughout; the other rows are random. Of all steps as many are kept as gave the smallest peak. The permutation then deals
what is left to all blocks, and the blocks are rotated again. All is orthogonal.

Here the randomness is before R's spreading, not behind it, where it would make row 0 uneven again.

Shape suffixes: T tokens, C channels, K rotations of B channels, N tokens of all blocks that share a rotation.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from .factors import Blocks, Chain, Permutation
from .permute import zigzag
from .rotation import random_orthogonal

By = Literal["column", "row"]


def duquant(x_TC: Tensor, block: int, steps: int, seed: int, *, shared: bool = True, by: By = "column") -> Chain:
    """Rotation, permutation, rotation, for inputs such as x_TC, any number of tokens: the peaks count, so the few with the greatest will do, or one
    row of max|x|. A single block has one rotation.

    shared: one matrix for all blocks, as in the paper, or one for each. by: how a step finds its channel, see `greedy_rotation`.
    Raises PlanishError: a block that does not divide C, no tokens.
    """
    channels = x_TC.shape[-1]
    if block < 1 or channels % block or not x_TC.numel():
        raise PlanishError(f"duquant in blocks of {block} for inputs {tuple(x_TC.shape)}: a block divides the channels, and there must be a token.")
    first = Blocks(greedy_rotation(_rows(x_TC, block, shared), steps, seed, by).float())
    if channels == block:
        return (first,)
    once_TC = first.on_input(x_TC.double())
    permutation = Permutation(zigzag(once_TC.abs().amax(0), channels // block))
    second = Blocks(greedy_rotation(_rows(permutation.on_input(once_TC), block, shared), steps, seed + 1, by).float())
    return first, permutation, second


def _rows(x_TC: Tensor, block: int, shared: bool) -> Tensor:
    """What each rotation sees, (K, N, B): of a shared one all blocks' inputs, token by token."""
    x_TKB = x_TC.double().reshape(len(x_TC), -1, block)
    return x_TKB.reshape(1, -1, block) if shared else x_TKB.transpose(0, 1)


def greedy_rotation(x_KNB: Tensor, steps: int, seed: int, by: By = "column") -> Tensor:
    """K orthogonal matrices (K, B, B) float64 for K independent inputs; the identity where no step makes the peak smaller.

    by column: a step takes the column of the greatest modulus, and the peak is the greatest modulus.
    by row: as the paper's released code, which takes the row's number modulo B, so in effect any channel, and as peak max - min.
    """
    count, rows, size = x_KNB.shape
    base_BB = spreading(size, seed).to(x_KNB.device)
    x_KNB = x_KNB.double()
    rotation_KBB = torch.eye(size, dtype=torch.float64, device=x_KNB.device).repeat(count, 1, 1)
    best_KBB, best_K = rotation_KBB, _peak(x_KNB, by)
    for _ in range(steps):
        place_K = x_KNB.abs().reshape(count, rows * size).argmax(1)
        channel_K = place_K % size if by == "column" else place_K // size % size
        step_KBB = torch.stack([_swapped(base_BB, channel) for channel in channel_K.tolist()])
        x_KNB, rotation_KBB = x_KNB @ step_KBB, rotation_KBB @ step_KBB
        peak_K = _peak(x_KNB, by)
        best_KBB = torch.where((peak_K < best_K)[:, None, None], rotation_KBB, best_KBB)
        best_K = torch.minimum(peak_K, best_K)
    return best_KBB


def _peak(x_KNB: Tensor, by: By) -> Tensor:
    return x_KNB.abs().amax((1, 2)) if by == "column" else x_KNB.amax((1, 2)) - x_KNB.amin((1, 2))


def _swapped(base_BB: Tensor, channel: int) -> Tensor:
    """E R E."""
    order_B = torch.arange(len(base_BB), device=base_BB.device)
    order_B[0], order_B[channel] = channel, 0
    return base_BB[order_B][:, order_B]


def spreading(size: int, seed: int) -> Tensor:
    """R: orthogonal, row 0 is 1 / sqrt(B), the rest is uniform by Haar's measure: (B, B) float64.

    That is diag(1, Q) P with Q random and P the reflection that takes the first unit vector to 1 / sqrt(B).
    """
    random_BB = torch.eye(size, dtype=torch.float64)
    if size == 1:
        return random_BB
    random_BB[1:, 1:] = random_orthogonal(size - 1, seed)
    normal_B = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal_B[0] -= 1
    normal_B /= normal_B.norm()
    return random_BB - 2 * torch.outer(random_BB @ normal_B, normal_B)
