"""Which arithmetic float32 matrix products use, switched for a while."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def bfloat16_products(on: bool) -> Iterator[None]:
    """While the `with` lasts, float32 matrix products round their factors to bfloat16 (TF32 on CUDA) and add in float32 (on), or do not (off).

    Exact where the factors are integer codes or bfloat16 values already. Products of bfloat16 add in float32 meanwhile, which CUDA does not always.
    """
    before, cuda = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    reduced = cuda.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("medium" if on else "highest")
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cuda.allow_bf16_reduced_precision_reduction = reduced


def ordered_attention(device: torch.device) -> AbstractContextManager[object]:
    """While the `with` lasts, gradients of attention are added in a fixed order on GPUs, where fused kernels do not; scores are in memory then."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
