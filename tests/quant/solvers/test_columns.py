"""The kernel that rounds a block of columns on a GPU is taken where it does what the loop does; tests/quant/kernels/interpreted.py runs it."""

import pytest
import torch

from planish.quant.formats import WeightFormat
from planish.quant.solvers import Gptq, Moments, columns

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    columns._works.cache_clear()
    monkeypatch.setattr(columns, "find_spec", lambda _name: True)


def test_a_kernel_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "launch", columns.one_by_one)
    assert columns._works(HERE)


def test_one_that_is_wrong_or_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "launch", lambda block, _bits: block.codes_KO.fill_(1))
    with pytest.warns(UserWarning, match="% of a trial's codes differ"):
        assert not columns._works(HERE)
    columns._works.cache_clear()
    monkeypatch.setattr(columns, "launch", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not columns._works(HERE)


def test_without_triton_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "find_spec", lambda _name: None)
    assert not columns._works(HERE)


@pytest.mark.parametrize("fmt", [WeightFormat(bits=4), WeightFormat(bits=3, symmetric=False, granularity="group", group_size=150)])
def test_blocks_are_no_longer_than_a_launch_takes(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever block_size says; it is of no matter to the result."""
    x_TI, w_OI, seen = torch.randn(400, 300), torch.randn(5, 300), set[int]()
    moments = Moments(second_II=x_TI.T @ x_TI, tokens=400, cross_II=None, ordinary=1.0)
    plain = Gptq(block_size=32).solve(w_OI, fmt, moments, torch.float32).weight

    def launch(block: columns.Block, bits: int) -> None:
        seen.add(len(block.weights_KO))
        assert {len(part) for part in block if part is not None} == {len(block.weights_KO)}
        assert block.shares_KK.shape[1] == len(block.weights_KO)
        columns.one_by_one(block, bits)

    for module in ("gptq", "columns"):
        monkeypatch.setattr(f"planish.quant.solvers.{module}.launched", lambda _weights: True)
    monkeypatch.setattr(columns, "launch", launch)
    found = Gptq(block_size=1000).solve(w_OI, fmt, moments, torch.float32).weight
    assert max(seen) == columns.LAUNCHED
    assert float((found.codes != plain.codes).float().mean()) < 0.01


def test_launches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel for every block, without it for every column; none on a CPU."""
    gpu = torch.device("cuda")
    assert columns.launches(300, gpu) == 3 * columns.launches(1, gpu) > 0
    monkeypatch.setattr(columns, "find_spec", lambda _name: None)
    assert columns.launches(300, gpu) == 300 * columns.launches(1, gpu)
    assert columns.launches(300, HERE) == 0
