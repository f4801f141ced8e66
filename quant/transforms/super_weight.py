"""Super weights held out of quantization: the few single weights without which a model breaks (Yu et al. 2024, arXiv:2411.07191).

A rotation smears such a weight over its row and column, after which there is no scalar to hold out. So its rank-1 term w e_row e_col' is subtracted
before, W = W_rest + up down, and executed beside the layer on the input before it is quantized; LowRank.through takes the path behind a rotation.
What remains is clipped, as the paper does, at mean + z * std, z of 9 to 20.

Shape suffixes: O out channels, C in channels, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PlanishError
from ..low_rank import LowRank


def hold_out(w_OC: Tensor, places: Sequence[tuple[int, int]], z: float | None = None) -> tuple[Tensor, LowRank]:
    """Take single weights out of w_OC: the weight without them, (O, C) in its dtype, and a float32 path of as many ranks as they have columns.

    places: (row, column) of each. z: clip the rest, see `clipped`; None: leave it as it is. rest + path.product() is w_OC where nothing was clipped.
    Raises PlanishError: no places, or one outside the weight.
    """
    out_channels, channels = w_OC.shape
    if not places:
        raise PlanishError("No super weights to hold out: places is empty. Leave the weight as it is.")
    for row, column in places:
        if not (0 <= row < out_channels and 0 <= column < channels):
            raise PlanishError(f"There is no weight ({row}, {column}) in a matrix of {out_channels} rows and {channels} columns.")
    columns = sorted({column for _, column in places})
    held_OC = torch.zeros(w_OC.shape, dtype=torch.bool, device=w_OC.device)
    held_OC[[row for row, _ in places], [column for _, column in places]] = True
    up_OR = torch.where(held_OC, w_OC, torch.zeros_like(w_OC))[:, columns].float()
    down_RC = torch.zeros(len(columns), channels, device=w_OC.device)
    down_RC[range(len(columns)), columns] = 1
    rest_OC = w_OC.masked_fill(held_OC, 0)
    return rest_OC if z is None else clipped(rest_OC, z, ~held_OC), LowRank(down_RC, up_OR)


def clipped(w_OC: Tensor, z: float, counted_OC: Tensor | None = None) -> Tensor:
    """w_OC within mean - z * std and mean + z * std of the whole matrix, or of the weights that are counted. In w's dtype."""
    if not z > 0:
        raise PlanishError(f"z is {z}, but it counts the standard deviations of a weight to keep, above 0. Usual: 9 to 20.")
    wide = (w_OC if counted_OC is None else w_OC[counted_OC]).double()
    mean, reach = float(wide.mean()), z * float(wide.std(correction=0))
    return w_OC.clamp(mean - reach, mean + reach)
