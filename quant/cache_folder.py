"""Where planish keeps what it makes once for a user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PLANISH_CACHE, else $XDG_CACHE_HOME/planish, else ~/.cache/planish. Not created here."""
    own = os.environ.get("PLANISH_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planish"
