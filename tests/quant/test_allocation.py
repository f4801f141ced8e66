"""The integer program against trying everything."""

import ctypes
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import milp

from planish.quant import allocation
from planish.quant.allocation import allocate, smallest
from planish.quant.errors import PlanishError

Places = list[list[tuple[float, int]]]
OPTION = st.tuples(st.floats(0, 10, allow_subnormal=False), st.integers(0, 10**6))


def brute(places: Places, budget: int) -> float:
    """The least cost there is."""
    return min(sum(cost for cost, _ in choice) for choice in product(*places) if sum(size for _, size in choice) <= budget)


@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
def test_least_cost_is_that_of_trying_everything(places: Places, share: float) -> None:
    costs, sizes = ([[option[part] for option in options] for options in places] for part in (0, 1))
    low, high = smallest(sizes), sum(max(size) for size in sizes)
    budget = low + int(share * (high - low))
    chosen = allocate(costs, sizes, budget)
    assert sum(size[c] for size, c in zip(sizes, chosen, strict=True)) <= budget
    assert sum(cost[c] for cost, c in zip(costs, chosen, strict=True)) == pytest.approx(brute(places, budget), abs=2e-5)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_the_dearest_place_gets_the_bits(unit: float) -> None:
    """Whatever costs are counted in, though the solver's tolerances are absolute."""
    assert allocate([[1.0 * unit, 0.0], [2.0 * unit, 0.0], [9.0 * unit, 0.0]], [[1, 2], [1, 2], [1, 2]], 4) == [0, 0, 1]


def test_of_options_that_cost_the_same_the_smaller() -> None:
    assert allocate([[1.0, 1.0, 1.0]], [[5, 3, 4]], 100) == [1]


def test_a_budget_to_the_byte() -> None:
    assert allocate([[1.0, 0.0], [1.0, 0.0]], [[10**9, 10**9 + 1], [10**9, 10**9 + 1]], 2 * 10**9 + 1).count(1) == 1


def test_a_budget_that_nothing_keeps() -> None:
    with pytest.raises(PlanishError, match="smallest options take 3, more than the budget of 2"):
        allocate([[0.0], [0.0]], [[1], [2]], 2)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What scipy 1.17's solver writes for large programs, from C, does not come out, not even later."""

    def talking(*arguments: Any, **named: Any) -> Any:
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
        return milp(*arguments, **named)

    monkeypatch.setattr(allocation, "milp", talking)
    assert allocate([[1.0, 0.0]], [[1, 2]], 2) == [1]
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "after\n"
