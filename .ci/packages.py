"""Compare the files of an sdist and of a wheel with the tree: both hold every file of every room, and nothing else of planish.

python .ci/packages.py SDIST WHEEL
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("quant", "calib", "eval", "recipes")


def tree(folder: str) -> set[str]:
    """The files below a folder of the repository, by their paths in it. Links to folders are not followed."""
    paths = (ROOT / folder).rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def sdist_files(sdist: str) -> set[str]:
    """The files of the rooms, the front door and the tests in an sdist, by their paths in the repository."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    return {name for name in names if name.startswith(tuple(f"{folder}/" for folder in (*ROOMS, "planish", "tests")))}


def compare(what: str, found: set[str], expected: set[str]) -> bool:
    """Print what is missing and what is too much. True if neither."""
    for name in sorted(expected - found):
        print(f"{what}: lacks {name}")
    for name in sorted(found - expected):
        print(f"{what}: holds {name}, which the tree lacks")
    print(f"{what}: {len(found & expected)} of {len(expected)} files")
    return found == expected


def main(sdist: str, wheel: str) -> int:
    """The exit code: 0 if both archives are complete."""
    rooms, front = set().union(*map(tree, ROOMS)), {name for name in tree("planish") if name.split("/")[1] not in ROOMS}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    complete = compare("sdist", sdist_files(sdist), rooms | front | tree("tests"))
    return 0 if compare("wheel", in_wheel, front | {f"planish/{name}" for name in rooms}) and complete else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
