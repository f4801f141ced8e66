"""GPTAQ (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML 2025).

GPTQ keeps w x of the input x that the quantized predecessors deliver; GPTAQ keeps w x_full, the output of the full-precision model:
min |w_hat x - w x_full|^2. When column j is rounded, the free columns F compensate its error and also what was missing in its input:

    w_F <- w_F - e_j * U_jF / U_jj + w0_j * P_jF,   P = alpha * ((D U^T) * strictly upper) U,   D = sum (x_full - x)^T x.

Row j of P / alpha is d_j X_F^T (X_F X_F^T)^-1, d_j = x_full_j - x_j over tokens: the best stand-in for the missing part.
With H = L^T L as in gptq.py, where columns collect deviations instead of errors, no inverse is needed either; column k collects besides

    sum_{j<k} w0_j * S_jk,   S = alpha * strictly upper (D L^-1) / diag L.

Equivalently it is GPTQ of the target w0 + w0 P, P = S shares^-T, shares_kj = L_kj / L_kk. That form is taken where columns are pulled towards
something (beta in gptq.py), and a group's grid then fits its target.

alpha below 1 guards against noise in D. w0_j is the original weight, as the objective has it; the paper's code takes the weight as updated so far,
with which corrections pile up and the error rises again towards alpha 1 where the two inputs are far apart.

Shape suffixes: I in channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PlanishError
from .gptq import Gptq, Setting, chosen, ordered
from .moments import Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptaq(Gptq):
    """GPTQ towards the full-precision outputs. alpha: part of the missing input that is made up for; 0 is GPTQ."""

    needs_cross: ClassVar[bool] = True
    choosable: ClassVar[Mapping[str, str]] = {**Gptq.choosable, "alpha": "the part of the input's error to make up for, 0 to 1. Usual: 0.25"}

    alpha: Setting = 0.25

    def _offsets(self, lower_II: Tensor, moments: Moments, order_I: Tensor | None) -> Tensor | None:
        """S, which makes up for what is missing in the inputs: (I, I)."""
        if moments.cross_II is None:
            raise PlanishError("solver gptaq needs moments of the full-precision inputs as well, but only the quantized stream was run. Choose gptq.")
        if not (alpha := chosen(self.alpha)):
            return None
        D_II = ordered(moments.cross_II.to(lower_II.dtype), order_I)
        solved_II: Tensor = torch.linalg.solve_triangular(lower_II, D_II, upper=False, left=False)
        return solved_II.triu_(1).mul_(alpha / lower_II.diagonal())
