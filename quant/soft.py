"""A quantized linear that descent can pass through: codes stay, the weights' scales and the activations' clip are numbers to be learned.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups.
"""

import torch
from torch import Tensor, nn

from .formats import ActivationFormat, QuantizedWeight, by_group
from .linear import QuantizedLinear, Side, StaticGrid, quantize_input, without_first
from .straight_through import rounded_input
from .transforms.factors import Chain, on_input


class SoftInput:
    """A site's input as codes, made once for all its readers. clip: a scalar that is learned, None where the range is fixed or there are no codes."""

    def __init__(self, activations: ActivationFormat | None, static: StaticGrid | None, chain: Chain, kept: int, learns: bool) -> None:
        self.activations, self.static, self.chain, self.kept = activations, static, chain, kept
        dynamic = activations is not None and activations.dynamic and static is None
        self.clip = torch.tensor(activations.clip).requires_grad_() if learns and dynamic and activations is not None else None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (..., C). Returns the transformed input and what codes make of it, both (T, C) float32."""
        if self._last is None or self._last[0] is not x:
            x_TC = on_input(self.chain, x.reshape(-1, x.shape[-1]).float())
            self._last = x, x_TC, self._coded(without_first(x_TC, self.kept))
        return self._last[1:]

    def _coded(self, x_TC: Tensor) -> Tensor:
        if self.activations is None:
            return x_TC
        if self.static is None:
            clip = torch.tensor(self.activations.clip) if self.clip is None else self.clip
            return rounded_input(x_TC, self.activations, clip)
        fixed_TC = quantize_input(x_TC.detach(), self.activations, self.static).dequantize()
        return x_TC + (fixed_TC - x_TC).detach()

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None


class SoftLinear(nn.Module):
    """y = Q(x T) Ŵᵀ + b as QuantizedLinear's, with every scale of Ŵ multiplied by exp(log_OG), at first 1.

    Gradients go to log_OG, to the input's clip and to x; through kept channels that are codes themselves none do.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, source: SoftInput, side: Side | None) -> None:
        super().__init__()
        self.source, self.matrix_OI = source, weight.dequantize()
        self.bias = None if bias is None else bias.float()
        self.log_OG = torch.zeros_like(weight.scale).requires_grad_()
        self.layer = None if side is None else QuantizedLinear(weight, None, side=side)
        self.passes_back = side is None or side.kept is None or not isinstance(side.kept.weight, QuantizedWeight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I). Returns (..., O) in x's dtype."""
        x_TC, coded_TC = self.source(x)
        factor_OG = self.log_OG.exp()
        if factor_OG.shape[1] == 1:
            y_TO = nn.functional.linear(coded_TC, self.matrix_OI) * factor_OG.T
        else:
            w_OI = (by_group(self.matrix_OI, factor_OG.shape[1]) * factor_OG[:, :, None]).flatten(1)
            y_TO = nn.functional.linear(coded_TC, w_OI)
        if self.layer is not None:
            y_TO = self.layer.beside(x_TC if self.passes_back else x_TC.detach(), y_TO)
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.to(x.dtype).reshape(*x.shape[:-1], y_TO.shape[1])
