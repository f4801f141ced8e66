"""Learned rotations: objectives value by value, a step against SpinQuant's formula, and the promises: orthogonal, never worse, the same again."""

import math
from typing import Any

import pytest
import torch
from helpers_transforms import normal, outliers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.transforms import learned
from planish.quant.transforms.hadamard import hadamard
from planish.quant.transforms.learned import Objective, learn_rotations, objective_of, turned
from planish.quant.transforms.rotation import random_orthogonal

OBJECTIVES: tuple[Objective, ...] = ("range", "kurtosis", "whip")


def learn_rotation(x_TC: Tensor, start_CC: Tensor, objective: Objective, steps: int, lr: float, **batches: Any) -> Tensor:
    """One rotation of all channels: a part of its own."""
    found_CC: Tensor = learn_rotations(x_TC, start_CC[None], objective, steps, lr, **batches)[0]
    return found_CC


def textbook(y_TC: Tensor, objective: str) -> float:
    """One token at a time, in plain numbers."""
    losses = []
    for token in y_TC.tolist():
        size = math.sqrt(sum(v * v for v in token) / len(token))
        values = [v / size for v in token]
        if objective == "range":
            losses.append((max(0.0, *values) - min(0.0, *values)) ** 2)
        elif objective == "whip":
            losses.append(sum(math.exp(-abs(v)) for v in values) / len(values))
        else:
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            losses.append(abs(sum((v - mean) ** 4 for v in values) / len(values) / variance**2 - 1.8))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective: Objective) -> None:
    y_TC = outliers(9, 7) * normal(9, 1).exp()
    y_TC = torch.cat([y_TC, y_TC.abs(), -y_TC.abs()])  # tokens on one side of zero too
    assert objective_of(y_TC, objective) == pytest.approx(textbook(y_TC, objective), rel=1e-12)
    assert objective_of(torch.cat([y_TC, torch.zeros(3, 7)]), objective) == objective_of(y_TC, objective)


def test_range_descends_by_a_soft_maximum() -> None:
    """Above the true range by at most 2 log(channels) / sharpness."""
    y_TC = outliers(9, 7)
    y_TC = y_TC / y_TC.square().mean(1, keepdim=True).sqrt()
    ranges = [sum(math.log(sum(math.exp(sign * 5 * v) for v in token)) / 5 for sign in (1, -1)) for token in y_TC.tolist()]
    assert float(learned._DESCENT["range"](y_TC)) == pytest.approx(sum(found**2 for found in ranges) / 9)
    for found, token in zip(ranges, y_TC.tolist(), strict=True):
        assert max(token) - min(token) < found < max(token) - min(token) + 2 * math.log(7) / 5


def test_the_range_decides_the_error_of_an_asymmetric_grid() -> None:
    """In units of (2^b - 1)^2 / 12 relative to the token's energy: true of 8 bits to a few percent."""
    y_TC = outliers(200, 64, seed=5) + 1
    low_T1, high_T1 = y_TC.amin(1, keepdim=True).clamp(max=0), y_TC.amax(1, keepdim=True).clamp(min=0)
    scale_T1 = (high_T1 - low_T1) / 255
    error_T = ((y_TC / scale_T1).round() * scale_T1 - y_TC).square().sum(1) / y_TC.square().sum(1)
    assert float(error_T.mean()) * 12 * 255**2 == pytest.approx(objective_of(y_TC, "range"), rel=0.05)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_spinquants(objective: Objective) -> None:
    """R' = (I + s/2 A)^-1 (I - s/2 A) R with A = G R' - R G' scaled to sqrt(C), for the first step, of which momentum leaves a tenth."""
    x_TC, start_CC, lr = outliers(40, 8), random_orthogonal(8, 1), 0.3
    x_TC = x_TC / x_TC.square().mean(1, keepdim=True).sqrt()
    R = start_CC.clone().requires_grad_()
    (G,) = torch.autograd.grad(learned._DESCENT[objective](x_TC @ R), R)
    A = G @ start_CC.T - start_CC @ G.T
    A = A * math.sqrt(8) / A.norm() * (1 - learned.MOMENTUM)
    eye = torch.eye(8, dtype=torch.float64)
    wanted = torch.linalg.inv(eye + lr / 2 * A) @ (eye - lr / 2 * A) @ start_CC
    assert objective_of(x_TC @ wanted, objective) < objective_of(x_TC @ start_CC, objective)
    torch.testing.assert_close(learn_rotation(x_TC, start_CC, objective, 1, lr), wanted, rtol=0, atol=1e-12)


@given(
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(0, 6),
    st.floats(0, 3),
    st.sampled_from(OBJECTIVES),
    st.sampled_from([None, 1, 7, 100]),
    st.integers(0, 99),
)
def test_orthogonal_and_never_worse(channels: int, tokens: int, steps: int, lr: float, objective: Objective, batch: int | None, seed: int) -> None:
    """Steps of any length, tokens of any number and size, zeros among them; in float32."""
    x_TC = (outliers(tokens, channels, seed) * normal(tokens, 1, seed=seed).mul(5).exp()).float()
    x_TC[::5] = 0
    start_CC = random_orthogonal(channels, seed)
    found_CC = learn_rotation(x_TC, start_CC.float(), objective, steps, lr, batch=batch, seed=seed)
    assert found_CC.dtype is torch.float64
    torch.testing.assert_close(found_CC @ found_CC.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-10)
    before, after = (objective_of(x_TC @ matrix.float(), objective) for matrix in (start_CC, found_CC))
    assert after <= before * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch", [None, 64])
def test_it_learns_what_holds_for_other_tokens(objective: Objective, batch: int | None) -> None:
    """Inputs with a large fixed part and correlated channels: a Hadamard leaves the fixed part where it falls."""
    mix_CC, offset_C = normal(32, 32, seed=1) * normal(32, seed=2).exp(), 20 * normal(32, seed=3)
    x_TC = normal(1024, 32) @ mix_CC + offset_C
    learn_TC, other_TC = x_TC[:512], x_TC[512:]
    found_CC = learn_rotation(learn_TC, hadamard(32), objective, 60, 0.1, batch=batch)
    before, after = (objective_of(other_TC @ matrix, objective) for matrix in (hadamard(32), found_CC))
    assert after < (0.6 if objective == "range" else 0.95) * before


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 12), st.sampled_from(OBJECTIVES), st.integers(0, 99))
def test_parts_and_groups(parts: int, groups: int, size: int, tokens: int, objective: Objective, seed: int) -> None:
    """Each part's groups are turned alike, by an orthogonal matrix, and the tokens as a whole are never worse."""
    x_TC = outliers(tokens, parts * groups * size, seed)
    start_KEE = torch.stack([random_orthogonal(size, seed + part) for part in range(parts)])
    found_KEE = learn_rotations(x_TC, start_KEE, objective, 5, 0.3)
    assert found_KEE.shape == (parts, size, size)
    torch.testing.assert_close(found_KEE @ found_KEE.mT, torch.eye(size, dtype=torch.float64).expand(parts, -1, -1), rtol=0, atol=1e-10)
    dense_CC = torch.block_diag(*(found_KEE[part] for part in range(parts) for _ in range(groups)))
    torch.testing.assert_close(turned(x_TC, found_KEE), x_TC @ dense_CC, rtol=0, atol=1e-9 * (1 + float(x_TC.abs().max()) if tokens else 1))
    assert objective_of(turned(x_TC, found_KEE), objective) <= objective_of(turned(x_TC, start_KEE), objective) * (1 + 1e-9)


def test_a_step_of_parts_is_the_gradient_of_what_is_shared() -> None:
    """Two parts of two groups: A of each from its own groups' gradients, all scaled to sqrt(K E)."""
    x_TC, lr = outliers(40, 12), 0.3
    x_TC = x_TC / x_TC.square().mean(1, keepdim=True).sqrt()
    start_KEE = torch.stack([random_orthogonal(3, 1), random_orthogonal(3, 2)])
    R = start_KEE.clone().requires_grad_()
    (G,) = torch.autograd.grad(learned._DESCENT["range"](x_TC @ torch.block_diag(R[0], R[0], R[1], R[1])), R)
    A = G @ start_KEE.mT - start_KEE @ G.mT
    A = A * math.sqrt(6) / A.norm() * (1 - learned.MOMENTUM)
    eye = torch.eye(3, dtype=torch.float64)
    wanted = torch.linalg.inv(eye + lr / 2 * A) @ (eye - lr / 2 * A) @ start_KEE
    assert objective_of(turned(x_TC, wanted), "range") < objective_of(turned(x_TC, start_KEE), "range")
    torch.testing.assert_close(learn_rotations(x_TC, start_KEE, "range", 1, lr), wanted, rtol=0, atol=1e-12)


def test_parts_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(PlanishError, match="not 2 orthogonal matrices that divide 10 channels"):
        learn_rotations(torch.ones(2, 10), torch.eye(3).expand(2, 3, 3), "range", 1, 0.1)


def test_a_pass_goes_over_the_tokens_once() -> None:
    x_TC = torch.arange(30.0)[:, None]
    batches = list(learned._batches(x_TC, 7, 6, 0))
    assert [last for _, last in batches] == [False, False, False, True, False, True]
    assert len(torch.cat([batch_TC for batch_TC, _ in batches[:4]]).unique()) == 28
    assert not torch.equal(batches[0][0], batches[4][0])


def test_rotations_are_judged_by_all_tokens() -> None:
    """However well one of them does, by the steps of a batch of one."""
    x_TC = normal(20, 8)
    best_CC = learn_rotation(x_TC, hadamard(8), "range", 60, 0.1)
    for seed in range(3):
        found_CC = learn_rotation(x_TC, best_CC, "range", 100, 1.0, batch=1, seed=seed)
        assert objective_of(x_TC @ found_CC, "range") <= objective_of(x_TC @ best_CC, "range") * (1 + 1e-9)


def test_the_best_of_all_that_were_judged_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TC, judged = normal(20, 8), []

    def noted(y_TC: Tensor, objective: Objective) -> float:
        judged.append(objective_of(y_TC, objective))
        return judged[-1]

    monkeypatch.setattr(learned, "objective_of", noted)
    found_CC = learn_rotation(x_TC, hadamard(8), "whip", 60, 3.0, batch=1, seed=1)
    assert objective_of(x_TC @ found_CC, "whip") == pytest.approx(min(judged), rel=1e-9)
    assert len(judged) == 4
    assert min(judged) < judged[-1] < judged[0]


def test_the_same_again() -> None:
    x_TC = outliers(100, 12)
    first, again, other = (learn_rotation(x_TC, hadamard(12), "range", 12, 0.1, batch=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inputs_are_left_as_they_are() -> None:
    x_TC, start_CC = outliers(10, 4), hadamard(4)
    before_TC, before_CC = x_TC.clone(), start_CC.clone()
    learn_rotation(x_TC, start_CC, "whip", 3, 0.1)
    assert torch.equal(x_TC, before_TC)
    assert torch.equal(start_CC, before_CC)
    assert not x_TC.requires_grad


@pytest.mark.parametrize(
    "start", [torch.ones(4, 4), torch.eye(3), torch.eye(4)[:, :3], torch.full((4, 4), torch.nan)], ids=["ones", "3", "4x3", "nan"]
)
def test_a_start_that_is_no_rotation_is_refused(start: Tensor) -> None:
    with pytest.raises(PlanishError, match="not an orthogonal matrix of 4 channels"):
        learn_rotation(torch.ones(2, 4), start, "range", 1, 0.1)


def test_a_batch_of_no_tokens_is_refused() -> None:
    with pytest.raises(PlanishError, match="cannot be learned from 0 tokens a step"):
        learn_rotation(torch.ones(2, 4), torch.eye(4), "range", 1, 0.1, batch=0)


def test_inputs_of_half_precision_are_learned_from_in_float32() -> None:
    x_TC = outliers(50, 8).bfloat16()
    assert torch.equal(learn_rotation(x_TC, hadamard(8), "range", 5, 0.1), learn_rotation(x_TC.float(), hadamard(8), "range", 5, 0.1))


def test_inputs_that_overflowed_are_refused() -> None:
    with pytest.raises(PlanishError, match="hold NaN or Inf"):
        learn_rotation(torch.full((2, 4), torch.inf), torch.eye(4), "range", 1, 0.1)
