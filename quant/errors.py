"""The one exception a user may see: where, what value, which rule, what to do."""

import difflib
from collections.abc import Iterable


class PlanishError(Exception):
    """An error that the user can act on. The command line prints it alone and exits with code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the near ones, or all that are known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names)}."
