"""What quantization does at each site of a compressed model: how far its readers' outputs are off, and what the whole model would gain without it.

Errors are relative, |y_hat - y| / |y|, of all readers of a site together, on the same input x for the full-precision readers and the quantized ones,
sink tokens left out. Apart: with the stored weights and the input as it is; with the full-precision weights and the input as codes; with both.

Shape suffixes: T tokens, C channels of a site, O out channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...calib.blocks.sites import Site, reader_weight
from ...quant.formats import ActivationFormat
from ...quant.linear import QuantizedLinear, quantize_input, without_first
from ...quant.transforms.factors import on_input, on_weight
from .score import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteView:
    """A site of a compressed checkpoint. format: of its weights and activations, in words.

    error, weights, activations: of its readers' outputs, relative: by both, by the weights alone, by the activations alone (None where these
    are not quantized). restored: the model with this site alone in full precision, beside the original; None where that was not measured.
    """

    block: int
    site: str
    format: str
    error: float
    weights: float
    activations: float | None
    restored: Comparison | None = None

    @property
    def name(self) -> str:
        """As 0.qkv."""
        return f"{self.block}.{self.site}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerView:
    """A compressed checkpoint beside its original, site by site. inputs: whose inputs the errors are on, base or quantized.

    whole: both models on the text, of windows of length tokens; the original too with the checkpoint's prefix before it, if there is one. sites:
    those that are quantized, in the model's order.
    """

    checkpoint: str
    model: str
    text: str
    windows: int
    length: int
    inputs: str
    whole: Comparison
    sites: tuple[SiteView, ...]
    seconds: float = 0.0


@dataclass(slots=True)
class SiteErrors:
    """Sums of squares at one site, over batches: of the outputs, and of what they are off by."""

    size: float = 0.0
    off: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("both", "weights", "activations"), 0.0))

    def add(self, twin: nn.Module, block: nn.Module, site: Site, x_TC: Tensor, kept: ActivationFormat | None) -> None:
        """The readers' outputs on x_TC. twin, block: in full precision, and as stored. kept: how channels that the codes leave out are quantized."""
        for path in site.readers:
            layer, reader = block.get_submodule(path), twin.get_submodule(path)
            assert isinstance(layer, QuantizedLinear)
            y_TO = reader(x_TC)
            self.size += _squares(y_TO)
            for part, found_TO in apart(layer, reader, x_TC, kept).items():
                self.off[part] += _squares(found_TO - y_TO)

    def relative(self, part: str) -> float:
        """The relative error by this part."""
        return float((self.off[part] / self.size) ** 0.5) if self.size else 0.0


def apart(layer: QuantizedLinear, reader: nn.Module, x_TC: Tensor, kept: ActivationFormat | None) -> Mapping[str, Tensor]:
    """The outputs of a layer with both, with the weights alone, and with the activations alone quantized: (T, O) each, float32.

    reader: the layer in full precision. Where activations are not quantized the first two are one, and the last is the exact output.
    """
    coded_TC = on_input(layer.chain, x_TC)
    both_TO = layer(x_TC)
    if layer.activations is None:
        return {"both": both_TO, "weights": both_TO, "activations": reader(x_TC)}
    first_TC = coded_TC[:, : layer.kept]
    codes_TC = quantize_input(without_first(coded_TC, layer.kept), layer.activations, layer.static).dequantize()
    whole_OC, _ = on_weight(layer.chain, reader_weight(reader).float())
    if layer.low is not None:
        whole_OC = whole_OC - layer.low.product().to(whole_OC.dtype)
    rounded_TC = first_TC if kept is None else quantize_input(first_TC, kept).dequantize()
    inputs_TO = nn.functional.linear(torch.cat([rounded_TC, codes_TC[:, layer.kept :]], dim=1), whole_OC, layer.bias)
    if layer.low is not None:
        inputs_TO = inputs_TO + layer.low.on_input(coded_TC)
    stored_OC = layer.matrix if layer.factor is None else layer.matrix * layer.factor.reshape(-1, 1)
    weights_TO = layer.beside(coded_TC, nn.functional.linear(without_first(coded_TC, layer.kept), stored_OC, layer.bias))
    return {"both": both_TO, "weights": weights_TO, "activations": inputs_TO}


def _squares(y_TO: Tensor) -> float:
    return float(y_TO.double().square().sum())


def chosen_sites(views: list[SiteView], count: int | None, evenly: bool) -> list[SiteView]:
    """Of which the effect on the whole is measured: the `count` of the largest error, or evenly spaced ones; None: all. In the model's order."""
    if count is None or count >= len(views):
        return list(views)
    if evenly:
        return [views[(2 * i + 1) * len(views) // (2 * count)] for i in range(count)]
    worst = sorted(views, key=lambda view: -view.error)[:count]
    return [view for view in views if view in worst]
