"""Registers the CUDA implementations; Triton is imported when the first of them is called, so that a CPU needs none."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from ..errors import PlanishError
from .schemas import LIBRARY, NAMES


@lru_cache(maxsize=16)
def _implementation(name: str) -> Callable[..., Any]:
    try:
        from . import cuda
    except ModuleNotFoundError as missing:
        raise PlanishError(
            f"planish::{name} on a CUDA device needs Triton, and {missing.name} is not installed: pip install 'planish[kernels]'."
        ) from None
    if name in ("linear_w8a8", "linear_w4a8", "linear_w4a4"):
        return partial(cuda.integer_linear, name)
    found: Callable[..., Any] = getattr(cuda, name)
    return found


def _call(name: str, *operands: Any) -> Any:
    """On the device of the first operand: Triton launches on the current one, whichever that is."""
    with torch.cuda.device_of(operands[0]):  # type: ignore[no-untyped-call]
        return _implementation(name)(*operands)


for _name in NAMES:
    LIBRARY.impl(_name, partial(_call, _name), "CUDA")  # type: ignore[no-untyped-call]
