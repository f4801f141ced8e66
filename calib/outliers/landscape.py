"""The picture of one sample's hidden states after one layer, small enough for a report: the classic |h| over tokens and channels.

Shape suffixes: L positions, D width, P positions shown.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from .diagnosis import Landscape

POSITIONS = 64  # the first ones
BINS = 128


def landscape(layer: int, h_LD: Tensor, tokens: Sequence[str]) -> Landscape:
    """The largest |h| of each bin of neighbouring channels, at most BINS of them, so that no massive channel is lost. Four digits.

    h_LD: hidden states of one sample. tokens: the text of each position.
    """
    width = h_LD.shape[1]
    bin_width = -(-width // BINS)
    size_PD = pad(h_LD[:POSITIONS].float().abs(), (0, -width % bin_width))
    values = size_PD.view(len(size_PD), -1, bin_width).amax(2).tolist()
    return Landscape(
        layer=layer,
        positions=tuple(range(len(size_PD))),
        tokens=tuple(tokens[: len(size_PD)]),
        channels=tuple(range(0, width, bin_width)),
        width=width,
        values=tuple(tuple(float(f"{value:.4g}") for value in row) for row in values),
    )
