"""Which arithmetic is used, and that it is switched back."""

from types import SimpleNamespace

import pytest
import torch

from planish.calib.machine.precision import bfloat16_products, working_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_working_dtype(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert working_dtype(torch.bfloat16, CPU) is (torch.bfloat16 if amx or avx512 else torch.float32)
    assert working_dtype(torch.float16, CPU) is torch.float32
    assert working_dtype(torch.float32, CPU) is torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_working_dtype_on_a_gpu_is_what_it_has_without_emulation(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_bf16_supported=lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: gpu)
    assert working_dtype(torch.bfloat16, torch.device("cuda")) is (torch.bfloat16 if native else torch.float32)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace())
    assert working_dtype(torch.bfloat16, torch.device("mps")) is torch.float32


def test_products_are_switched_back() -> None:
    before = torch.get_float32_matmul_precision()
    with bfloat16_products(True):
        assert torch.get_float32_matmul_precision() == "medium"
        with bfloat16_products(False):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="stop"), bfloat16_products(True):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("on", [True, False])
def test_products_of_bfloat16_add_in_float32_meanwhile(on: bool) -> None:
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_bf16_reduced_precision_reduction
    with bfloat16_products(on):
        assert not cuda.allow_bf16_reduced_precision_reduction
    assert before
    assert cuda.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("on", [True, False])
def test_products_of_bfloat16_values_are_exact_either_way(on: bool) -> None:
    a, b = torch.randint(-255, 256, (2, 64, 64)).float()
    with bfloat16_products(on):
        assert torch.equal((a @ b).long(), a.long() @ b.long())
