"""The house rules that a machine can check: where things are, what may import what, how long things get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("quant", "calib", "eval", "planish")  # a room imports itself and the ones before it
LINKS = ("quant", "calib", "eval", "recipes")
FLOORS = {  # of the rooms within a room: each imports itself and those of the floors before; single files stand above them
    "calib": (("machine", "blocks"), ("files",), ("compressed", "data"), ("walk",), ("outliers",)),
    "eval": (("scores",), ("servers",), ("tasks", "verifying", "pages")),
    "planish": (
        ("common", "serving"),
        ("recipe",),
        ("walk", "terminal", "loading"),
        ("planning",),
        ("compressing",),
        ("comparing", "evaluating", "inspecting", "layerwise", "searching"),
    ),
}
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKS)
SOURCES = sorted({*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / ".ci").rglob("*.py")})


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package(path: Path) -> list[str]:
    """The package a module lies in, as relative imports see it: quant/solvers/gptq.py -> planish, quant, solvers."""
    folders = list(path.relative_to(ROOT).parts[:-1])
    return folders if folders[0] == "planish" else ["planish", *folders]


def room_of(module: list[str]) -> str:
    return module[1] if len(module) > 1 and module[1] in ROOMS else "planish"


def relative_imports(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line and the full name of everything that a module imports from planish by relative import."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = package(path)
            base = here[: len(here) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                yield node.lineno, [*base, alias.name]


def absolute_imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the top-level package of every absolute import."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize("name", LINKS)
def test_links_lead_to_the_rooms(name: str) -> None:
    link = ROOT / "planish" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert link.is_dir()


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_imports_point_one_way(path: Path) -> None:
    mine = ROOMS.index(room_of(package(path)))
    wrong = [f"line {line}: {'.'.join(name)}" for line, name in relative_imports(path) if ROOMS.index(room_of(name)) > mine]
    assert not wrong, f"a room may import only the rooms before it ({' <- '.join(ROOMS)})"


@pytest.mark.parametrize("path", [path for path in MODULES if path.relative_to(ROOT).parts[0] in FLOORS], ids=identity)
def test_rooms_within_rooms_have_floors(path: Path) -> None:
    here = package(path)
    floor = {room: number for number, rooms in enumerate(FLOORS[room_of(here)]) for room in rooms}
    depth = 1 if room_of(here) == "planish" else 2  # where in a full name the inner room stands
    mine = here[depth] if len(here) > depth else None
    names = ((line, name) for line, name in relative_imports(path) if room_of(name) == room_of(here))
    used = [(line, name[depth]) for line, name in names if len(name) > depth + 1 and name[depth] != mine]
    wrong = [f"line {line}: {room}" for line, room in used if mine is not None and floor.get(room, len(floor)) >= floor[mine]]
    assert not wrong, "a room may import only those of the floors before it: see FLOORS"


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_rooms_are_imported_relatively(path: Path) -> None:
    assert not [f"line {line}: {name}" for line, name in absolute_imports(path) if name in (*ROOMS, "recipes")]


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in MODULES], ids=identity)
def test_rooms_are_named_through_planish(path: Path) -> None:
    assert not [f"line {line}: {name}" for line, name in absolute_imports(path) if name in LINKS]


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f"line {node.lineno}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=identity)
def test_every_folder_is_a_package(folder: Path) -> None:
    assert (folder / "__init__.py").is_file()


def test_the_package_is_typed() -> None:
    assert (ROOT / "planish" / "py.typed").is_file()


def test_the_changelog_mentions_the_version() -> None:
    line = next(line for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines() if line.startswith("version = "))
    assert f"## {line.split(chr(34))[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_tier_has_a_marker_in_the_tests() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__).resolve())
    assert not [tier for tier in ("smoke", "server") if f"mark.{tier}" not in text]
