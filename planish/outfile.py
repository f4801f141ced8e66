"""Files that a command is asked to write: refused before the work where they cannot be."""

from pathlib import Path

from .quant.errors import PlanishError


def check_outfile(file: Path, *, replace: bool = False, advice: str = "Choose another name, or add --force.") -> None:
    """PlanishError if a file cannot be written there: no folder, or something is there that is not to be replaced."""
    if not file.absolute().parent.is_dir():
        raise PlanishError(f"{file}: there is no folder {file.parent}. Make it first, or give another name.")
    if file.is_dir():
        raise PlanishError(f"{file}: is a folder. Give the name of a file.")
    if not replace and (file.exists() or file.is_symlink()):
        raise PlanishError(f"{file}: exists, and planish overwrites nothing unasked. {advice}")
