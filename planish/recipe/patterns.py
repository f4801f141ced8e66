"""Which sites a recipe means."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..calib.blocks.sites import kind_of


def matches(patterns: Sequence[str], block: int, site: str) -> bool:
    """Whether one of the patterns matches the site of that block. An expert's site is matched by what matches that of all experts, too."""
    names = {f"{block}.{site}", f"{block}.{kind_of(site)}"}
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
