"""Where a model runs, and how much memory is there."""

import psutil
import pytest
import torch

from planish.calib.machine.device import free_bytes, pick_device, taken_bytes
from planish.quant.errors import PlanishError

CPU = torch.device("cpu")


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device(CPU) == CPU
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "warp", "mps:0"):
        with pytest.raises(PlanishError, match=f"device '{name}' is not available, or has no float64, which planish needs. Here: cpu"):
            pick_device(name)
    with pytest.raises(PlanishError, match="holds no numbers"):
        pick_device("meta")


def test_memory_of_a_cpu_is_the_machine_s() -> None:
    assert 0 < free_bytes(CPU) < psutil.virtual_memory().total
    assert taken_bytes(CPU) is None


class _Gpu:
    """What torch tells of a GPU's memory."""

    def mem_get_info(self, _device: torch.device) -> tuple[int, int]:
        return 7_000, 10_000

    def memory_reserved(self, _device: torch.device) -> int:
        return 2_500

    def memory_allocated(self, _device: torch.device) -> int:
        return 1_000

    def max_memory_allocated(self, _device: torch.device) -> int:
        return 2_000


def test_memory_of_a_gpu_counts_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _device: _Gpu())
    assert free_bytes(torch.device("cuda")) == 8_500
    assert taken_bytes(torch.device("cuda")) == 2_000
