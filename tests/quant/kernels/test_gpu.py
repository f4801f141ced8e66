"""How the operators reach a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from planish.quant.kernels import gpu


def test_launched_on_the_device_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that is not the current one, on which Triton launches."""
    happened: list[object] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        happened.append(x)
        yield
        happened.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(gpu, "_implementation", lambda name: lambda *operands: happened.append((name, *operands)))
    x = torch.ones(1)
    gpu._call("quantize_per_token", x, 8)
    assert happened == [x, ("quantize_per_token", x, 8), "left"]
