"""Descent on a few numbers by their slopes."""

from collections.abc import Sequence

import torch
from torch import Tensor

Group = tuple[list[Tensor], float]
"""Numbers, and by how much the first step changes each."""


class Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980, algorithm 1) with its usual constants. torch's own brings a compiler along, which takes 2 seconds."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.numbers = [number for numbers, _ in groups for number in numbers]
        self.rates = [rate for numbers, rate in groups for _ in numbers]
        self.mean, self.square = ([torch.zeros_like(number) for number in self.numbers] for _ in range(2))
        self.steps = 0

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], part: float) -> None:
        """Against the slopes, by `part` of the rates."""
        self.steps += 1
        for number, rate, slope, mean, square in zip(self.numbers, self.rates, slopes, self.mean, self.square, strict=True):
            mean.lerp_(slope, 0.1)
            square.mul_(0.999).addcmul_(slope, slope, value=0.001)
            size = (square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
            number.addcdiv_(mean, size, value=-part * rate / (1 - 0.9**self.steps))
