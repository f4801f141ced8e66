"""raise_activations: which sites are the neediest, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.errors import PlanishError
from planish.quant.transforms.raising import RaiseActivations, neediest

errors = st.dictionaries(st.integers(), st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=8)


@given(errors, st.integers(0, 9))
def test_none_that_is_left_gains_more_than_one_that_is_taken(pairs: dict[int, tuple[float, float]], count: int) -> None:
    taken = neediest(pairs, count)
    gains = {key: before * before - after * after for key, (before, after) in pairs.items()}
    assert len(taken) == len(set(taken)) == min(count, sum(gain > 0 for gain in gains.values()))
    assert all(gains[key] > 0 for key in taken)
    assert all(gains[left] <= gains[key] for left in gains.keys() - taken for key in taken)


@pytest.mark.parametrize(("share", "sites", "count"), [(0.05, 120, 6), (0.05, 19, 0), (0.25, 12, 3), (1.0, 7, 7), (0.1, 30, 3), (0.29, 100, 29)])
def test_a_share_is_never_exceeded(share: float, sites: int, count: int) -> None:
    assert RaiseActivations(share=share).count(sites) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 2}, "bits is 2"), ({"bits": 9}, "bits is 9"), ({"share": 0.0}, "share is 0.0"), ({"share": 1.5}, "share is 1.5")],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanishError, match=rf"raise_activations\.{message}"):
        RaiseActivations(**settings)  # type: ignore[arg-type]
