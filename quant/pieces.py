"""How many values are worked on at a time where several passes go over them."""

from collections.abc import Iterator

from torch import Tensor

CACHED = 1 << 18  # float32 values that stay in a processor's cache, where passes over them are several times faster
LAUNCHED = 1 << 24  # on a GPU every pass over a piece is a launch: few pieces, of 64 MB


def pieces(x_RC: Tensor) -> Iterator[slice]:
    """All its rows, in slices."""
    size = max(1, (CACHED if x_RC.device.type == "cpu" else LAUNCHED) // max(1, x_RC.shape[1]))
    return (slice(start, start + size) for start in range(0, len(x_RC), size))
