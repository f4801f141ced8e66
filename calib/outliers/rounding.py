"""What rounding costs at one site, with and without the transforms that flatten outliers.

Weights are rounded to nearest per output channel, activations dynamically per token, both symmetric; the error is that of all readers' outputs
together, against the products in float32. The transforms, which leave those products as they are:
smooth: x / s, W s, with s of SmoothQuant (Xiao et al. 2023) from ordinary tokens;
hadamard: x H, W H (QuaRot, Ashkboos et al. 2024); both: smooth, then hadamard (SmoothRot, 2025).
Whether the model can absorb them for free is not asked here.

Shape suffixes: T tokens, C channels of the site, O out channels of all its readers together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.errors import PlanishError
from ...quant.formats import ActivationFormat, WeightFormat
from ...quant.linear import QuantizedInput, QuantizedLinear, quantize_input
from ...quant.solvers import Rtn
from ...quant.transforms.hadamard import rotate
from ...quant.transforms.smooth import smoothing_scale
from ..machine.precision import bfloat16_products
from .diagnosis import SCHEMES, TRANSFORMS
from .difficulty import binned

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""Bits of weights and of activations of diagnosis.SCHEMES."""
STRENGTHS = (0.5, 0.8)
"""Exponents of smoothing that are tried. On SmolLM2-135M the better of them errs 2 % more, in the mean, than the best of eleven; 0.5 alone 16 %."""
_PIECE_TOKENS = 512  # pieces whose products stay in the cache until their error is taken


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingErrors:
    """What output_errors finds. errors, errors_every, channel_absmax_after: as in diagnosis.SiteFigures (the latter without plain).

    strengths: scheme -> transform -> the smoothing strength behind the number, for smooth and both. The pictures of these two are with
    the strength of the first scheme.
    """

    errors: Mapping[str, Mapping[str, float]]
    errors_every: Mapping[str, Mapping[str, float]]
    strengths: Mapping[str, Mapping[str, float]]
    channel_absmax_after: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """One transform, with one strength. square: scheme -> squared error of the output by token (T,). absmax_C: of ordinary tokens."""

    strength: float | None
    square: Mapping[str, Tensor]
    absmax_C: Tensor


@torch.no_grad()
def output_errors(x_TC: Tensor, keep_T: Tensor, weights: Sequence[Tensor], name: str = "a site") -> RoundingErrors:
    """The relative output errors of one site under every scheme and transform.

    x_TC: a sample of its input (T, C), any float type. keep_T: bool, False for the sink tokens. weights: (O, C) of each reader, any float type.
    name: the site, for messages. Of STRENGTHS, the one with the least error over ordinary tokens at that scheme counts.
    Raises PlanishError if no ordinary token is there, or the outputs are not finite.
    """
    if not bool(keep_T.any()):
        raise PlanishError(f"Rounding errors of {name}: not one token of the sample is no sink. Give more calibration text.")
    x_TC, w_OC = x_TC.float(), torch.cat([weight.float() for weight in weights])
    with bfloat16_products(False):
        y_TO = x_TC @ w_OC.T
        size_T = y_TO.square().sum(1)
        if not bool(torch.isfinite(size_T).all()):
            raise PlanishError(f"Rounding errors of {name}: the outputs of its readers are not finite. Check the model's weights.")
        trials = _trials(x_TC, keep_T, w_OC, y_TO)
    errors: dict[str, dict[str, float]] = {}
    every: dict[str, dict[str, float]] = {}
    strengths: dict[str, dict[str, float]] = {}
    after: dict[str, tuple[float, ...]] = {}
    for scheme in SCHEMES:
        best = {transform: min(tried, key=lambda trial: float(trial.square[scheme][keep_T].sum())) for transform, tried in trials.items()}
        errors[scheme] = {transform: _relative(trial.square[scheme][keep_T], size_T[keep_T]) for transform, trial in best.items()}
        every[scheme] = {transform: _relative(trial.square[scheme], size_T) for transform, trial in best.items()}
        strengths[scheme] = {transform: trial.strength for transform, trial in best.items() if trial.strength is not None}
        after = after or {transform: binned(trial.absmax_C) for transform, trial in best.items() if transform != "plain"}
    return RoundingErrors(errors=errors, errors_every=every, strengths=strengths, channel_absmax_after=after)


def _trials(x_TC: Tensor, keep_T: Tensor, w_OC: Tensor, y_TO: Tensor) -> dict[str, list[_Trial]]:
    """Every transform with every strength, in the order of TRANSFORMS."""
    x_absmax_C, w_absmax_C = x_TC[keep_T].abs().amax(0), w_OC.abs().amax(0)
    driven_C = x_TC.abs().amax(0) > x_absmax_C  # by sink tokens alone: such a column is not to be made small beside its row
    trials: dict[str, list[_Trial]] = {transform: [] for transform in TRANSFORMS}
    for strength in (None, *STRENGTHS):
        straight, rotated = ("plain", "hadamard") if strength is None else ("smooth", "both")
        scaled_TC, scaled_OC = x_TC, w_OC
        if strength is not None:
            scale_C = smoothing_scale(x_absmax_C, w_absmax_C, strength)
            scale_C = torch.where(driven_C, scale_C.clamp(min=1), scale_C)
            scaled_TC, scaled_OC = x_TC / scale_C, w_OC * scale_C
        trials[straight].append(_trial(strength, scaled_TC, keep_T, scaled_OC, y_TO))
        trials[rotated].append(_trial(strength, rotate(scaled_TC), keep_T, rotate(scaled_OC), y_TO))
    return trials


def _trial(strength: float | None, x_TC: Tensor, keep_T: Tensor, w_OC: Tensor, y_TO: Tensor) -> _Trial:
    """Round both, to each number of bits once, and multiply."""
    inputs = {bits: quantize_input(x_TC, ActivationFormat(bits=bits)) for bits in {bits for _, bits in BITS.values()}}
    rounded = {bits: Rtn().solve(w_OC, WeightFormat(bits=bits), None, torch.float32).weight for bits in {bits for bits, _ in BITS.values()}}
    square = {
        scheme: _square_error(QuantizedLinear(rounded[w_bits], None, ActivationFormat(bits=x_bits)), inputs[x_bits], y_TO)
        for scheme, (w_bits, x_bits) in BITS.items()
    }
    return _Trial(strength, square, x_TC[keep_T].abs().amax(0))


def _square_error(layer: QuantizedLinear, x: QuantizedInput, y_TO: Tensor) -> Tensor:
    """The squared error of the layer's output by token: (T,)."""
    found = []
    with bfloat16_products(True):  # exact: both factors are codes of at most 8 bits
        for start in range(0, len(y_TO), _PIECE_TOKENS):
            piece = slice(start, start + _PIECE_TOKENS)
            part = QuantizedInput(x.codes[piece], x.scale[piece], None)
            off_TO = layer.multiply(part, layer.left(part)).sub_(y_TO[piece])
            found.append(off_TO.square_().sum(1))
    return torch.cat(found)


def _relative(square_T: Tensor, size_T: Tensor) -> float:
    """The root of their sums' ratio; 0 where both are zero."""
    off, size = square_T.sum(dtype=torch.float64).item(), size_T.sum(dtype=torch.float64).item()
    return float((off / size) ** 0.5) if size else float(off > 0)
