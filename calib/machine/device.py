"""Where a model runs, how much memory is free there, and how much was taken."""

import gc
from types import ModuleType

import psutil
import torch

from ...quant.errors import PlanishError


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, None: cuda where there is one, else cpu. Errors: no such device here."""
    device = name if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, dtype=torch.float64, device=where)
    except (RuntimeError, AssertionError) as error:  # torch has no one exception for a device that is not there
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise PlanishError(f"device {str(device)!r} is not available, or has no float64, which planish needs. Here: {', '.join(known)}.") from error
    if where.type == "meta":
        raise PlanishError("device 'meta' holds no numbers. Give cpu or cuda.")
    return where


def own_memory(device: torch.device) -> ModuleType | None:
    """torch's module of a device that has memory of its own and tells of it, as torch.cuda does."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def free_bytes(device: torch.device) -> int:
    """Bytes that are free for a model on this device; of a GPU also what torch holds there and does not use."""
    own = own_memory(device)
    if own is None:
        return int(psutil.virtual_memory().available)
    return int(own.mem_get_info(device)[0]) + int(own.memory_reserved(device)) - int(own.memory_allocated(device))


def give_back(device: torch.device | str) -> None:
    """What torch holds of a GPU's memory and does not use, for other processes."""
    gc.collect()
    own = own_memory(torch.device(device))
    if own is not None:
        own.empty_cache()


def device_name(device: torch.device) -> str:
    """Of a GPU what it is, else the device's type: sums have another order on another kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def taken_bytes(device: torch.device) -> int | None:
    """The most bytes that this process has used on a device with memory of its own; None for one that uses the process's."""
    own = own_memory(device)
    return None if own is None else int(own.max_memory_allocated(device))
