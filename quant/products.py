"""Which arithmetic float32 matrix products use, switched for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_products(on: bool) -> Iterator[None]:
    """While the `with` lasts, float32 matrix products round their factors to bfloat16 and add in float32 (on), or do not (off).

    Exact where the factors are integer codes or bfloat16 values already.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
