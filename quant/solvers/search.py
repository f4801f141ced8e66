"""Choosing a solver's settings by text that it has not seen.

What GPTAQ makes up for, how far FOEM pulls back and how much a Hessian is damped all weigh the calibration text against the weights as they are.
How much of that text is noise no formula knows, so some batches are held out. Every candidate rounds with the moments of the others and is judged on
the held-out ones by what GPTAQ means to keep: with E = w_hat - w and d = x_full - x

    sum |w_hat x - w x_full|^2 = tr(E H E') - 2 tr(E D' w') + const,   H = sum x' x, D = sum d' x,

where nothing but H and D of the held-out text is needed (D = 0 where only one stream was run).

The held-out batches take no part in the final rounding either. Where they did, the inputs of all later layers would come from weights fitted to them,
D would be as much in them as in the rest, and too much of it would be made up for: demo model, W4A4, alpha of 0, 0.25, 0.5, 1, perplexity 23.21,
where 0.25 everywhere has 22.81. Held out of everything (of 40 samples 8; alpha up to 0.5; damping of 0.02, 0.05, 0.2): 22.69, at no better a
divergence.

Shape suffixes: O out channels, I in channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import ScaleType, WeightFormat
from .gptq import Gptq
from .moments import Moments

SEARCH_ROWS = 256  # rows of a weight that candidates round, evenly spaced, about so many; each row is a problem of its own


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The solver with the best settings. judged: the held-out sum with each candidate, by name, over tr(w H w') and up to a constant that all share,
    so that it may be negative. settings: the chosen ones. Both are empty where there was nothing to choose.
    """

    solver: Gptq
    settings: Mapping[str, float]
    judged: Mapping[str, float]


@torch.no_grad()
def choose(solver: Gptq, w_OI: Tensor, fmt: WeightFormat, moments: Moments, scale_dtype: ScaleType) -> Choice:
    """Choose among the solver's settings for a weight (out, in). Of equally good candidates the first is taken.

    Raises PlanishError: moments without held-out ones, and what solvers refuse.
    """
    if not solver.searched:
        return Choice(solver, {}, {})
    if moments.held_out is None:
        raise PlanishError(f"solver.{solver.searched[0]} is a list to choose from, but no text was held out. Give moments of some, or one number.")
    some_OI = w_OI[:: -(-len(w_OI) // SEARCH_ROWS)].contiguous()
    size = float((some_OI @ moments.held_out.second_II.to(some_OI.dtype) * some_OI).sum())
    candidates = solver.candidates()
    judged: dict[str, float] = {}
    for settings, candidate in candidates:
        hat_OI = candidate.solve(some_OI, fmt, moments, scale_dtype).weight.dequantize().to(some_OI.dtype)
        judged[_name(settings)] = held_out_error(some_OI, hat_OI, moments.held_out) / size if size > 0 else 0.0
    settings, best = min(candidates, key=lambda candidate: judged[_name(candidate[0])])
    return Choice(best, settings, judged)


def held_out_error(w_OI: Tensor, hat_OI: Tensor, moments: Moments) -> float:
    """Sum |hat x - w x_full|^2 over tokens, less the sum |w (x_full - x)|^2 that every hat shares."""
    e_OI = hat_OI - w_OI
    error = (e_OI @ moments.second_II.to(w_OI.dtype) * e_OI).sum(dtype=torch.float64)
    if moments.cross_II is not None:
        error -= 2 * (e_OI @ moments.cross_II.T.to(w_OI.dtype) * w_OI).sum(dtype=torch.float64)
    return float(error)


def _name(settings: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in settings.items())
