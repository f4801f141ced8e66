"""Texts to measure on, as they are asked for. Light to import: a slip is refused at once."""

from collections.abc import Sequence
from pathlib import Path

from ..quant.errors import PlanishError

BUILTIN = "builtin"
NO_TEXT = "none"
"""Where a text is asked for, and none is to be measured."""


def named_texts(texts: Sequence[str]) -> dict[str, str]:
    """Sources by name, from NAME=FILE or FILE alone, whose name is then the file's; the built-in text before them. Raises PlanishError."""
    found = {BUILTIN: BUILTIN}
    for given in texts:
        name, sign, source = given.partition("=")
        name, source = (name, source) if sign else (Path(given).stem, given)
        if source == BUILTIN:
            raise PlanishError(f"--text {given}: the built-in text is measured anyway. Leave it out.")
        if not name or not source:
            raise PlanishError(f"--text {given!r} is no text. Write NAME=FILE, such as wiki=wiki.test.txt.")
        if name in found:
            raise PlanishError(f"--text {given}: there is a text named {name} already. Write NAME=FILE with another name.")
        found[name] = source
    return found
