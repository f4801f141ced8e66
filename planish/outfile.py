"""Files and folders that a command is asked to write: refused before the work where they cannot be."""

import tempfile
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
    check_writable(file)


def check_writable(path: Path) -> None:
    """PlanishError if nothing can be made where the path is to be: tried with a file that has no name, in the nearest folder that there is."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise PlanishError(f"{path}: {folder} is a file. Give another place.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PlanishError(f"{path}: {folder} cannot be written ({error.strerror}). Give a place where you may write.") from error
