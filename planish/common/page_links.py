"""Pages that planish wrote, found again by the mark in their heads, so that new ones link to them."""

import html
import re
from pathlib import Path

HEAD = 4096  # bytes of a page in which the mark stands
_MARK = re.compile(r'<meta name="planish-report" content="([^"]*)">')


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
