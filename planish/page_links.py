"""Pages that planish wrote, found again by the mark in their heads, so that new ones link to them."""

import html
import re
from pathlib import Path

from .quant.errors import PlanishError

HEAD = 4096  # bytes of a page in which the mark stands
_MARK = re.compile(r'<meta name="planish-report" content="([^"]*)">')


def check_file(file: Path, *, replace: bool = False, advice: str = "Choose another name, or add --force.") -> None:
    """PlanishError if a file cannot be written there: no folder, or something is there that is not to be replaced."""
    if not file.absolute().parent.is_dir():
        raise PlanishError(f"{file}: there is no folder {file.parent}. Make it first, or give another name.")
    if file.is_dir():
        raise PlanishError(f"{file}: is a folder. Give the name of a file.")
    if not replace and (file.exists() or file.is_symlink()):
        raise PlanishError(f"{file}: exists, and planish overwrites nothing unasked. {advice}")


def about(page: Path) -> str | None:
    """What a page says that it is, such as "inspect: MODEL"; None if it is no page of planish."""
    with page.open("rb") as file:
        found = _MARK.search(file.read(HEAD).decode("utf-8", "replace"))
    return None if found is None else html.unescape(found[1])


def beside(page: Path) -> dict[str, str]:
    """The other pages of planish in the folder of `page`, which need not exist: file name -> what it is."""
    others = sorted(path for path in page.absolute().parent.glob("*.html") if path.is_file() and path.name != page.name)
    found = {path.name: about(path) for path in others}
    return {name: words for name, words in found.items() if words is not None}
