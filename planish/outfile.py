"""Files that a command is asked to write: refused before the work where they cannot be."""

from pathlib import Path

from .quant.errors import PlanishError


def check_outfile(path: Path, force: bool) -> None:
    """PlanishError if there is no folder for the file, if it is a folder, or if it exists and force does not say to replace it."""
    if not path.absolute().parent.is_dir():
        raise PlanishError(f"{path}: there is no folder {path.parent}. Make it first, or give another name.")
    if path.is_dir():
        raise PlanishError(f"{path}: is a folder. Give the name of a file.")
    if not force and (path.exists() or path.is_symlink()):
        raise PlanishError(f"{path}: exists, and planish overwrites nothing unasked. Choose another name, or add --force.")
