"""Files and folders that a command is asked to write: refused before the work where they cannot be."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..quant.errors import PlanishError

ABOUT = "about.json"
"""The file that makes a folder a comparison's."""


def check_outfile(file: Path, *, replace: bool = False, advice: str = "Choose another name, or add --force.") -> None:
    """PlanishError if a file cannot be written there: no folder, or something is there that is not to be replaced."""
    if not file.absolute().parent.is_dir():
        raise PlanishError(f"{file}: there is no folder {file.parent}. Make it first, or give another name.")
    if file.is_dir():
        raise PlanishError(f"{file}: is a folder. Give the name of a file.")
    if not replace and (file.exists() or file.is_symlink()):
        raise PlanishError(f"{file}: exists, and planish overwrites nothing unasked. {advice}")
    check_writable(file)


def check_outfiles(files: Mapping[str, Path | None], *, replace: bool) -> None:
    """As check_outfile and check_apart of all files. files: by what asks for each, such as --html; None: not asked for."""
    check_apart(files)
    for file in files.values():
        if file is not None:
            check_outfile(file, replace=replace)


def check_comparison(folder: Path) -> None:
    """PlanishError if something else than a comparison is there, or nothing can be written."""
    if (folder.exists() or folder.is_symlink()) and not (folder / ABOUT).is_file():
        raise PlanishError(f"{folder}: exists and is no comparison, and planish overwrites nothing. Choose another output folder.")
    check_writable(folder / ABOUT)


def check_apart(files: Mapping[str, Path | None]) -> None:
    """PlanishError if two files or folders of one command are the same, or one would lie inside another or inside its working folder NAME.partial.

    files: by what asks for each, such as --html; None: not asked for.
    """
    given = [(name, path, path.resolve()) for name, path in files.items() if path is not None]
    for name, path, place in given:
        taken = (place, place.with_name(place.name + ".partial"))
        for other, another, there in given:
            if other == name:
                continue
            if there == place:
                raise PlanishError(f"{name} and {other} are both {path}, and one would replace the other. Give each a name of its own.")
            if any(folder == there or folder in there.parents for folder in taken):
                raise PlanishError(f"{other} {another}: lies where {name} {path} is made. Give it a place of its own.")


def check_writable(path: Path) -> None:
    """PlanishError if nothing can be made where the path is to be: tried with a file that has no name, in the nearest folder that there is."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise PlanishError(f"{path}: {folder} is a file. Give another place.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PlanishError(f"{path}: {folder} cannot be written ({error.strerror}). Give a place where you may write.") from error
