"""Which option each place takes, so that the sum of costs is least and the sum of sizes keeps within a budget: a multiple-choice knapsack.

minimise sum_s sum_c cost[s, c] x[s, c], x binary, sum_c x[s, c] = 1 for every place s, sum_s sum_c size[s, c] x[s, c] <= budget.
(Integer program as in HAWQ-V3, Yao et al. 2021, arXiv:2011.10680, section 3.4.) Solved exactly by HiGHS through scipy.optimize.milp.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .errors import PlanishError


def smallest(sizes: Sequence[Sequence[int]]) -> int:
    """The least total size there is."""
    return sum(min(options) for options in sizes)


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each place, by number: the least total cost within the budget; of equal options at a place the smaller.

    costs: finite, sizes: whole numbers, both [place][option]. Raises PlanishError where not even the smallest options fit.
    """
    least = smallest(sizes)
    if least > budget:
        raise PlanishError(f"the smallest options take {least}, more than the budget of {budget}.")
    kept = [_undominated(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    places = np.repeat(np.arange(len(kept)), [len(options) for options in kept])
    cost = np.array([costs[s][c] for s, options in enumerate(kept) for c in options], dtype=np.float64)
    more = [sizes[s][c] - min(sizes[s]) for s, options in enumerate(kept) for c in options]  # small whole numbers, for tolerances are absolute
    unit = math.gcd(*more) or 1
    size = np.array([extra // unit for extra in more], dtype=np.float64)
    one_each = csr_array((np.ones(len(places)), (places, np.arange(len(places)))), shape=(len(kept), len(places)))
    with _silent():
        found = milp(
            cost / max(float(np.abs(cost).max()), 1e-300),
            integrality=np.ones(len(cost), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], -np.inf, (budget - least) // unit)],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise RuntimeError(f"HiGHS: {found.message}")
    chosen = [0] * len(kept)
    for column in np.flatnonzero(found.x > 0.5):
        chosen[places[column]] = kept[places[column]][column - int(np.searchsorted(places, places[column]))]
    return chosen


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes what its authors once looked for to file descriptor 1, whatever it is told (scipy 1.17): among a command's own JSON, say."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _undominated(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The options that are cheaper than every one that is no larger."""
    kept: list[int] = []
    for option in sorted(range(len(costs)), key=lambda option: (sizes[option], costs[option])):
        if not kept or costs[option] < costs[kept[-1]]:
            kept.append(option)
    return kept
