"""Which arithmetic the walk uses, and how it is switched on for a while."""

from contextlib import nullcontext

import torch

from ...quant.products import bfloat16_products as bfloat16_products
from ...quant.products import ordered_attention as ordered_attention


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the walk: bfloat16 for a bfloat16 model where the hardware multiplies it natively, else float32."""
    if stored is not torch.bfloat16:
        return torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        module = torch.get_device_module(device)
        asked, current = getattr(module, "is_bf16_supported", None), getattr(module, "device", None)
        with nullcontext() if current is None else current(device):  # it is asked of the current one
            native = asked is not None and asked(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
