"""FlatQuant: the error against loops over tokens, outputs and channels, its slope against a twin with dense matrices, and the promises: exact, never
worse than the start, the same again.

Shape suffixes: T tokens, C channels, O out channels.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers_transforms import assert_layer_stays, dense_chain, normal, outliers, second
from torch import Tensor

from planish.quant.descent import Adam
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import quantize_input
from planish.quant.solvers import Rtn
from planish.quant.transforms import Cat, Flat
from planish.quant.transforms import flat as module
from planish.quant.transforms.cat import cat_blocks
from planish.quant.transforms.factors import Blocks, Hadamard, Kronecker, Scale, on_input
from planish.quant.transforms.flat import input_error, weight_error
from planish.quant.transforms.flat_shapes import BlockShape, KroneckerShape, Shape, _cat_factors
from planish.quant.transforms.inputs import SiteView
from planish.quant.transforms.rotate import mixing

W4A4 = Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=4, symmetric=False))
ONE = torch.tensor(1.0)
STARTS = ("cat", "hadamard", "identity")


def view(tokens: int = 60, channels: int = 24, outputs: tuple[int, ...] = (9, 20), scheme: Scheme | None = W4A4, seed: int = 0) -> SiteView:
    x_TC = outliers(tokens, channels, seed).float()
    weights = tuple(normal(o, channels, seed=seed + 5 + i).float() for i, o in enumerate(outputs))
    return SiteView(x_TC, second(x_TC) / len(x_TC), x_TC.mean(0), weights, scheme)


def test_the_error_of_inputs_by_loops() -> None:
    y_TC, w_OC = outliers(5, 6).float(), normal(4, 6).float()
    assert W4A4.activations is not None
    rounded, total = quantize_input(y_TC, W4A4.activations).dequantize(), 0.0
    for t in range(5):
        for o in range(4):
            total += sum(float(rounded[t, c] - y_TC[t, c]) * float(w_OC[o, c]) for c in range(6)) ** 2
    assert float(input_error(y_TC, w_OC, W4A4, ONE)) == pytest.approx(total / 5, rel=1e-5)
    assert float(input_error(y_TC, w_OC, Scheme(weights=W4A4.weights), ONE)) == 0


def test_the_error_of_weights_by_loops() -> None:
    y_TC, w_OC = outliers(5, 6).float(), normal(4, 6).float()
    assert W4A4.weights is not None
    rounded, total = Rtn(clip=None).solve(w_OC, W4A4.weights, None, torch.float32).weight.dequantize(), 0.0
    for t in range(5):
        for o in range(4):
            total += sum(float(rounded[o, c] - w_OC[o, c]) * float(y_TC[t, c]) for c in range(6)) ** 2
    assert float(weight_error(y_TC, w_OC, W4A4, ONE)) == pytest.approx(total / 5, rel=1e-4)


def shapes(seen: SiteView, start: str) -> tuple[BlockShape, KroneckerShape]:
    return BlockShape.of(seen, start, 0.02, 8), KroneckerShape.of(seen, start, 0.02, 0)  # type: ignore[arg-type]


def shaken(shape: Shape) -> None:
    """Some way off from the start."""
    for i, (numbers, _) in enumerate(shape.groups(1.0)):
        for change in numbers:
            change.data += 0.05 * normal(*change.shape, seed=i).float()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_descended_is_what_is_returned(start: str, which: int) -> None:
    """front and chains together are the chain, the weight's way is the inverse of the input's, and the layer stays."""
    shape: Shape = shapes(view(), start)[which]
    shaken(shape)
    inward, outward = shape.chains()
    x_TC, w_OC = normal(6, 24).float(), normal(5, 24, seed=2).float()
    y_TC = on_input(inward, on_input(shape.front, x_TC)).detach()
    torch.testing.assert_close(y_TC, on_input(shape.chain(), x_TC), rtol=1e-4, atol=1e-4)
    assert_close_products(on_input(inward, x_TC).detach() @ on_input(outward, w_OC).detach().T, x_TC @ w_OC.T)
    assert_layer_stays(shape.chain(), 24, tolerance=1e-5)


def assert_close_products(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_step_moves_each_axis_by_lr_of_its_length() -> None:
    """Adam's first step changes every number alike; a channel's size moves a tenth as fast."""
    for shape in shapes(view(), "identity"):
        for numbers, rate in shape.groups(0.04):
            for change in numbers:
                expected = 0.04 if change.ndim > 1 else 0.004 * math.sqrt(24)
                torch.testing.assert_close(torch.full_like(change, rate).norm(dim=-1), torch.full(change.shape[:-1], expected))


def test_starts() -> None:
    seen, eye = view(), torch.eye(24, dtype=torch.float64)
    for shape in shapes(seen, "identity"):
        torch.testing.assert_close(dense_chain(shape.chain(), 24), eye)
    for shape in shapes(seen, "hadamard"):
        T = dense_chain(shape.chain(), 24)
        torch.testing.assert_close(T @ T.T, eye, rtol=0, atol=1e-5)
    blocks, kronecker = (shape.chain() for shape in shapes(seen, "cat"))
    torch.testing.assert_close(dense_chain(blocks, 24), dense_chain(Cat(block=8).chain(seen), 24), rtol=1e-6, atol=1e-6)
    assert [type(factor) for factor in blocks] == [Blocks, Hadamard]
    assert [type(factor) for factor in kronecker] == [Scale, Kronecker]
    assert [tuple(t.shape) for t in kronecker[1].tensors().values()] == [(4, 4), (6, 6)]


def test_a_kronecker_product_starts_with_equal_moments_where_they_are_products() -> None:
    """As CAT does with any moments: T' S_x T = T^-1 S_w T^-T, up to a factor."""

    def moments(size: int, seed: int) -> Tensor:
        return second(normal(3 * size, size, seed=seed)) / size

    x_CC, w_CC = (torch.kron(moments(3, seed), moments(4, seed + 1)) for seed in (0, 5))
    w_OC = torch.linalg.cholesky(w_CC).T
    seen = SiteView(normal(8, 12).float(), x_CC.float(), torch.zeros(12), (w_OC.float(),), W4A4)
    T = dense_chain(KroneckerShape.of(seen, "cat", 1e-6, 0).chain(), 12)
    inverse = torch.linalg.inv(T)
    found, wanted = T.T @ x_CC @ T, inverse @ w_CC @ inverse.T
    torch.testing.assert_close(found / found.trace(), wanted / wanted.trace(), rtol=0, atol=1e-4)


def test_a_kronecker_product_starts_with_each_factor_on_moments_summed_over_the_other() -> None:
    """The left one's first; the right one's are of what is behind the left one."""
    seen = view(channels=12)
    x_CC, w_CC, eye_BB = seen.second_CC.double(), seen.readers_CC.double(), torch.eye(4, dtype=torch.float64)

    def factor(x_CC: Tensor, w_CC: Tensor, over: str) -> Tensor:
        x_NN, w_NN = (torch.einsum(over, moments.reshape(3, 4, 3, 4)) for moments in (x_CC, w_CC))
        return cat_blocks(x_NN, w_NN, len(x_NN), 0.02).matrix_KBB[0].double()

    left_AA = factor(x_CC, w_CC, "ikjk->ij")
    T, inverse = torch.kron(left_AA, eye_BB), torch.kron(torch.linalg.inv(left_AA).contiguous(), eye_BB)
    right_BB = factor(T.T @ x_CC @ T, inverse @ w_CC @ inverse.T, "kikj->ij")
    found_AA, found_BB = _cat_factors(seen, (3, 4), 0.02)
    torch.testing.assert_close(found_AA.double(), left_AA, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_BB.double(), right_BB, rtol=1e-4, atol=1e-5)
    shape = KroneckerShape.of(seen, "cat", 0.02, 1)  # behind a divisor, and then mixed
    for found, start in zip((shape.left_AA, shape.right_BB), _cat_factors(seen.through(shape.front), (3, 4), 0.02), strict=True):
        torch.testing.assert_close(found.double(), start.double() @ dense_chain(mixing(len(start), "hadamard", 1), len(start)), rtol=1e-4, atol=1e-5)


class _ByHand(torch.autograd.Function):
    """4-bit rounding of each row's clipped range, its gradient written out: the identity inside the grid, what the scale does everywhere."""

    @staticmethod
    def forward(ctx: object, x: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:  # type: ignore[override]
        scale = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
        zero = torch.zeros_like(scale) if symmetric else (-8 - low / scale).round()
        codes = (x / scale + zero).round()
        inside, integers = (codes >= -8) & (codes <= 7), codes.clamp(-8, 7) - zero
        by_scale = integers - torch.where(inside, x / scale, 0)
        ctx.save_for_backward(inside, by_scale, -low > high)  # type: ignore[attr-defined]
        ctx.symmetric = symmetric  # type: ignore[attr-defined]
        return integers * scale

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inside, by_scale, negative = ctx.saved_tensors  # type: ignore[attr-defined]
        total = (g * by_scale).sum(1, keepdim=True)
        if ctx.symmetric:  # type: ignore[attr-defined]
            return g * inside, -total / 7 * negative, total / 7 * ~negative, None
        return g * inside, -total / 15, total / 15, None


def twin_rounded(x: Tensor, clip: Tensor, symmetric: bool) -> Tensor:
    low, high = x.min(1, keepdim=True).values.clamp(max=0) * clip, x.max(1, keepdim=True).values.clamp(min=0) * clip
    found: Tensor = _ByHand.apply(x, low, high, symmetric)
    return found


def shaped(structure: str, block: int, **settings: Any) -> Flat:
    """Of that structure; in blocks of so many channels, if in any."""
    return Flat(structure=structure, **({"block": block} if structure == "blocks" else {}), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("structure", ["blocks", "kronecker"])
def test_loss_and_slope_are_those_of_dense_matrices(structure: str, learns: bool) -> None:
    """With all tokens and rows in a step, and from a place off the start: T built by torch.kron and torch.block_diag, inverted whole."""
    settings = shaped(structure, 4, start="identity", balance=0.5, clip=learns)
    seen = view(40, 12, (7, 9))
    shape: Shape = KroneckerShape.of(seen, "identity", 0.02, 0) if structure == "kronecker" else BlockShape.of(seen, "identity", 0.02, 4)
    shaken(shape)
    descent = module._Descent(settings, seen, shape, W4A4)
    changes = [change for numbers, _ in shape.groups(1.0) for change in numbers]
    learned = [*changes, *descent.logits[not learns :]]
    found = descent._loss()
    found_slopes = torch.autograd.grad(found, learned)
    if structure == "kronecker":
        T = torch.diag(changes[2].exp()) @ torch.kron(torch.eye(3) + changes[0], torch.eye(4) + changes[1])
    else:
        T = torch.block_diag(*(torch.eye(4) + change for change in changes[0]))
    x_TC, held_TC, w_OC = seen.sample_TC[:30], seen.sample_TC[30:], torch.cat(seen.weights)
    y_TC, z_OC = x_TC @ T, w_OC @ torch.linalg.inv(T).T
    clip, weight_clip = (1 / (1 + (-logit).exp()) for logit in descent.logits)
    clip = clip if learns else ONE
    inputs = ((twin_rounded(y_TC, clip, False) - y_TC) @ z_OC.T).square().sum()
    weights = (y_TC @ (twin_rounded(z_OC, weight_clip, True) - z_OC).T).square().sum()
    wanted = (inputs + 0.5 * weights) / len(x_TC) / ((held_TC @ w_OC.T).square().sum() / len(held_TC))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    twin_slopes = torch.autograd.grad(wanted, learned)
    for mine, twin in zip(found_slopes, twin_slopes, strict=True):
        torch.testing.assert_close(mine, twin, rtol=0, atol=1e-3 * float(twin.abs().max()))


@pytest.mark.parametrize("seed", range(3))
def test_chains_are_judged_and_clips_begun_with_on_tokens_held_out(seed: int) -> None:
    seen = view(160, 12, (7, 9), seed=seed)
    shape = KroneckerShape.of(seen, "cat", 0.02, 0)
    shaken(shape)
    descent = module._Descent(Flat(balance=0.5), seen, shape, W4A4)
    T = dense_chain(shape.chain(), 12).float()
    held_TC, w_OC = seen.sample_TC[120:], torch.cat(seen.weights)
    y_TC, z_OC = held_TC @ T, w_OC @ torch.linalg.inv(T).T

    def inputs(clip: float) -> float:
        return float(((twin_rounded(y_TC, torch.tensor(clip), False) - y_TC) @ z_OC.T).square().sum())

    weights = min(float((y_TC @ (twin_rounded(z_OC, torch.tensor(clip), True) - z_OC).T).square().sum()) for clip in (1.0, 0.9, 0.8, 0.7, 0.6))
    size = float((held_TC @ w_OC.T).square().sum())
    for clip in (1.0, 0.7):
        assert descent._judged(shape.chain(), clip) == pytest.approx((inputs(clip) + 0.5 * weights) / size, rel=1e-3)
    best = min((1 - i / 40 for i in range(13)), key=inputs)
    assert float(descent.fixed) == pytest.approx(best)
    assert descent.best.clip == best
    assert descent.logits[0].sigmoid().item() == pytest.approx(min(best, 0.98))


@pytest.mark.parametrize("scheme", [W4A4, Scheme(weights=W4A4.weights)], ids=["w4a4", "w4"])
def test_some_tokens_and_rows_stand_for_all(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step and where a chain is judged; here all are alike."""
    x_TC, w_OC = outliers(1, 24).float().expand(64, 24), normal(1, 24).float().expand(40, 24)
    seen = SiteView(x_TC, second(x_TC) / 64, x_TC.mean(0), (w_OC,), scheme)

    def losses() -> tuple[float, float]:
        descent = module._Descent(Flat(start="identity"), seen, KroneckerShape.of(seen, "identity", 0.02, 0), scheme)
        return descent._loss().item(), descent._judged(descent.best.chain, descent.best.clip)

    whole = losses()
    for name, few in (("BATCH", 16), ("ROWS", 8), ("JUDGED_TOKENS", 4), ("JUDGED_ROWS", 8)):
        monkeypatch.setattr(module, name, few)
    assert losses() == pytest.approx(whole, rel=1e-4)


def test_steps_fall_to_nothing_as_a_cosine_and_multiply_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, precisions, loss = [], [], module._Descent._loss

    class Noted(Adam):
        def step(self, slopes: Sequence[Tensor], part: float) -> None:
            parts.append(part)
            super().step(slopes, part)

    def noted(descent: module._Descent) -> Tensor:
        precisions.append(torch.get_float32_matmul_precision())
        return loss(descent)

    monkeypatch.setattr(module, "Adam", Noted)
    monkeypatch.setattr(module._Descent, "_loss", noted)
    Flat(steps=4).learned(view())
    assert precisions == ["medium"] * 4
    assert parts == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


@pytest.mark.parametrize("structure", ["blocks", "kronecker"])
@pytest.mark.parametrize("start", STARTS)
def test_learns_is_exact_and_the_same_again(structure: str, start: str) -> None:
    step = shaped(structure, 8, start=start, steps=40, lr=0.1)
    found, again = step.learned(view(800)), step.learned(view(800))
    assert found.after < 0.95 * found.before
    assert found.clip is not None
    assert 0.3 < found.clip < 1
    assert_layer_stays(found.chain, 24, tolerance=1e-4)
    assert (found.clip, found.after) == (again.clip, again.after)
    for mine, twin in zip(found.chain, again.chain, strict=True):
        assert all(torch.equal(mine.tensors()[name], twin.tensors()[name]) for name in mine.tensors())


@pytest.mark.parametrize(("steps", "judged"), [(3, [1, 2, 3]), (9, [2, 4, 6, 8, 9])])
def test_a_chain_is_judged_some_times_and_at_the_end(steps: int, judged: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    done, descend = [0], module._Descent._steps
    seen: list[int] = []

    def counted(descent: module._Descent) -> Iterator[int]:
        for done[0] in descend(descent):
            yield done[0]

    monkeypatch.setattr(module._Descent, "_steps", counted)
    monkeypatch.setattr(module._Descent, "_judge", lambda _descent: seen.append(done[0]))
    Flat(steps=steps).learned(view())
    assert seen == judged


def test_more_steps_learn_more() -> None:
    after = [Flat(start="hadamard", lr=0.1, steps=steps).learned(view(800)).after for steps in (0, 10, 60)]
    assert all(more < less for less, more in pairwise(after))


@pytest.mark.parametrize("lr", [0.01, 1.0])
@pytest.mark.parametrize("structure", ["blocks", "kronecker"])
@pytest.mark.parametrize(("tokens", "channels", "outputs"), [(1, 1, 1), (3, 5, 2), (9, 7, 9), (40, 16, 40)])
def test_never_worse_than_the_start(structure: str, lr: float, tokens: int, channels: int, outputs: int) -> None:
    """Odd and tiny sizes, and steps far too long."""
    seen = view(tokens, channels, (outputs,))
    found, start = shaped(structure, 4, steps=6, lr=lr).learned(seen), shaped(structure, 4, steps=0).learned(seen)
    assert found.after <= found.before == start.after
    assert_layer_stays(found.chain, channels, tolerance=1e-3)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weights=WeightFormat(bits=4)),
        Scheme(
            weights=WeightFormat(bits=4, granularity="group", group_size=8), activations=ActivationFormat(bits=4, granularity="group", group_size=8)
        ),
        Scheme(weights=WeightFormat(bits=4, granularity="tensor"), activations=ActivationFormat(bits=8, granularity="tensor")),
    ],
    ids=str,
)
def test_any_scheme(scheme: Scheme) -> None:
    found = Flat(steps=40, lr=0.1, start="hadamard").learned(view(800, scheme=scheme))
    assert found.after < 0.9 * found.before
    assert (found.clip is None) == (scheme.activations is None)


def test_without_a_scheme_or_anything_to_hold_small_it_is_the_start() -> None:
    dead = SiteView(torch.zeros(8, 24), torch.zeros(24, 24), torch.zeros(24), (torch.zeros(3, 24),), W4A4)
    for seen in (view(scheme=None), dead):
        found, start = Flat(steps=4).learned(seen), KroneckerShape.of(seen, "cat", 0.02, 0).chain()
        torch.testing.assert_close(dense_chain(found.chain, 24), dense_chain(start, 24))
        assert found.clip is None


def test_a_clip_that_is_not_learned_is_the_formats() -> None:
    scheme = Scheme(weights=W4A4.weights, activations=ActivationFormat(bits=4, clip=0.8))
    assert Flat(steps=4, clip=False).learned(view(scheme=scheme)).clip is None
    static = Scheme(weights=W4A4.weights, activations=ActivationFormat(bits=8, granularity="tensor", dynamic=False))
    assert Flat(steps=4).learned(view(scheme=static)).clip is None


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"lr": 0.0}, {"tokens": 3}, {"balance": 2.0}, {"damping": 0.0}, {"block": 0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanishError, match=f"flat.{next(iter(wrong))} is"):
        Flat(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ignored", "instead"),
    [
        ({"block": 64}, "set structure: blocks"),
        ({"start": "identity", "damping": 0.1}, "set start: cat"),
        ({"objective": "block", "tokens": 64}, "set objective: site"),
    ],
    ids=str,
)
def test_settings_that_nothing_would_come_of_are_refused(ignored: dict[str, Any], instead: str) -> None:
    with pytest.raises(PlanishError, match=f"flat.{list(ignored)[-1]} is .*{instead}"):
        Flat(**ignored)
