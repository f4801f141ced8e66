"""Which arithmetic the walk uses, and how it is switched on for a while."""

import torch

from ..quant.errors import PlanishError
from ..quant.products import bfloat16_products as bfloat16_products


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, None: cuda where there is one, else cpu. Errors: no such device here."""
    device = name if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch has no one exception for a device that is not there
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise PlanishError(f"device {str(device)!r} is not available. Here: {', '.join(known)}.") from error
    return where


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the walk: bfloat16 for a bfloat16 model where the hardware multiplies it natively, else float32."""
    if stored is not torch.bfloat16:
        return torch.float32
    native = torch.cpu._is_amx_tile_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if native else torch.float32
