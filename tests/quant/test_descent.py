"""Descent: Adam is torch's."""

import torch
from helpers_transforms import normal

from planish.quant.descent import Adam


def test_adam_is_torchs() -> None:
    mine, twin = (normal(3, 4).requires_grad_() for _ in range(2))
    target, adam, torchs = normal(3, 4, seed=1), Adam([([mine], 0.1)]), torch.optim.Adam([twin], lr=0.1)
    for _ in range(5):
        adam.step(torch.autograd.grad((mine - target).pow(4).sum(), [mine]), 1.0)
        torchs.zero_grad()
        (twin - target).pow(4).sum().backward()  # type: ignore[no-untyped-call]
        torchs.step()
    torch.testing.assert_close(mine, twin)
