"""Seeds: what generators take."""

from .errors import PlanishError

LARGEST = 2**63 - 1
"""Of a generator; those that are derived from it by adding a little still are numbers of 64 bits."""


def check_seed(name: str, seed: int, instead: str = "") -> None:
    """PlanishError for a seed outside 0..LARGEST. name: the setting's. instead: what else may be given, for the message."""
    if seed < 0:
        raise PlanishError(f"{name} is {seed}, but must be at least 0{instead}.")
    if seed > LARGEST:
        raise PlanishError(f"{name} is {seed}, but must be at most {LARGEST} (2^63 - 1){instead}.")
