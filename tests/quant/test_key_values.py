"""Keys and values in codes: against loops, and R3 leaves scores as they are and makes keys with outlier channels easier to hold."""

import pytest
import torch
from helpers_transforms import outliers

from planish.quant.errors import PlanishError
from planish.quant.key_values import HeldKeyValues, KvCache


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    """With outlier channels, the same for all tokens."""
    rows = outliers(shape[0] * shape[1] * shape[2], shape[3], seed).float()
    return rows.view(shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_by_loops(bits: int, symmetric: bool) -> None:
    x_BKSD, cache = keys(2, 2, 3, 8), KvCache(bits=bits, symmetric=symmetric, clip=0.9)
    found_BKSD = cache.held(x_BKSD)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)):
        row, found = x_BKSD[tuple(index)], found_BKSD[tuple(index)]
        low, high = min(0.0, float(row.min()) * 0.9), max(0.0, float(row.max()) * 0.9)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = max(-low, high) / most if symmetric else (high - low) / (most - least)
        zero = 0 if symmetric else min(max(round(least - low / scale), least), most)
        for value, coded in zip(row.tolist(), found.tolist(), strict=True):
            code = min(max(round(value / scale + zero), least), most)
            assert coded == pytest.approx((code - zero) * scale, abs=1e-3 * scale) or abs(value / scale % 1 - 0.5) < 1e-3


@pytest.mark.parametrize("size", [8, 12, 16, 24, 64, 80, 96, 128])
def test_scores_stay_what_they_are_when_both_are_turned(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 5, size, generator=generator) for heads in (4, 2, 2))
    held = HeldKeyValues(KvCache(), rotated=True, first=5)  # all of it prefix: nothing is rounded
    turned_query, turned_key, same_value = held.through(query, key, value)
    scores, turned = (q @ k.repeat_interleave(2, dim=1).mT for q, k in ((query, key), (turned_query, turned_key)))
    assert float((turned - scores).norm() / scores.norm()) < 1e-5
    assert torch.equal(same_value, value)


def test_turned_keys_lose_less() -> None:
    """Scores are off by less than half as much, keys having outlier channels."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 1, 2, 40, 64, generator=generator)
    key[..., [5, 40]] *= 15
    query[..., [5, 40]] /= 15
    exact, off = query @ key.mT, []
    for rotated in (False, True):
        q, k, _ = HeldKeyValues(KvCache(), rotated).through(query, key, value)
        off.append(float((q @ k.mT - exact).norm() / exact.norm()))
    assert off[1] < 0.5 * off[0]


def test_a_prefix_stays_in_full_precision() -> None:
    x_BKSD = keys(1, 2, 6, 16)
    _, key, value = HeldKeyValues(KvCache(bits=2), first=2).through(x_BKSD, x_BKSD, x_BKSD)
    for found in (key, value):
        assert torch.equal(found[:, :, :2], x_BKSD[:, :, :2])
        assert torch.equal(found[:, :, 2:], KvCache(bits=2).held(x_BKSD[:, :, 2:]))
        assert not torch.equal(found[:, :, 2:], x_BKSD[:, :, 2:])


def test_the_gradient_passes() -> None:
    x_BKSD = keys(1, 1, 3, 8).requires_grad_()
    (slope,) = torch.autograd.grad(KvCache().held(x_BKSD).sum(), x_BKSD)
    assert torch.equal(slope, torch.ones_like(slope))


@pytest.mark.parametrize(("settings", "message"), [({"bits": 1}, "kv_cache.bits is 1"), ({"bits": 9}, "is 9"), ({"clip": 0.0}, "kv_cache.clip is 0")])
def test_what_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(PlanishError, match=message.replace(".", r"\.")):
        KvCache(**settings)  # type: ignore[arg-type]
