"""Descent: Adam is torch's."""

import torch
from helpers_transforms import normal

from planish.quant.descent import Adam


def test_adam_is_torchs() -> None:
    """Of two groups with rates of their own, each step by a part of them."""
    mine, twins = ([normal(3, 4).requires_grad_(), normal(5, seed=2).requires_grad_()] for _ in range(2))
    targets, rates = (normal(3, 4, seed=1), normal(5, seed=3)), (0.1, 0.02)
    adam = Adam([([number], rate) for number, rate in zip(mine, rates, strict=True)])
    torchs = torch.optim.Adam([{"params": [twin], "lr": rate} for twin, rate in zip(twins, rates, strict=True)])

    def loss(numbers: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(number - target).pow(4).sum() for number, target in zip(numbers, targets, strict=True)]).sum()

    for part in (1.0, 0.7, 0.3, 0.1):
        adam.step(torch.autograd.grad(loss(mine), mine), part)
        for group, rate in zip(torchs.param_groups, rates, strict=True):
            group["lr"] = part * rate
        torchs.zero_grad()
        loss(twins).backward()  # type: ignore[no-untyped-call]
        torchs.step()
    torch.testing.assert_close(mine, twins)
