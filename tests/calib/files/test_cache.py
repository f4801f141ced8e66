"""Folders in the cache are whole or absent."""

from pathlib import Path

import pytest

from planish.calib.files.cache import build_once, cache_folder, content_hash
from planish.quant.errors import PlanishError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1")
    (folder / "weights").chmod(0o600)


def test_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("PLANISH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/planish")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "planish"
    monkeypatch.setenv("PLANISH_CACHE", "~/own")
    assert cache_folder() == Path("/home/someone/own")


def test_built_once_and_readable_by_others(cache: Path) -> None:
    folder = build_once("a", write)
    assert folder == cache / "a"
    assert (folder.stat().st_mode & 0o777, (folder / "weights").stat().st_mode & 0o777) == (0o755, 0o644)
    assert build_once("a", lambda partial: pytest.fail("built again")) == folder
    assert list(cache.iterdir()) == [folder]


def test_failure_leaves_nothing(cache: Path) -> None:
    def fail(partial: Path) -> None:
        write(partial)
        raise PlanishError("broken")

    with pytest.raises(PlanishError, match="broken"):
        build_once("a", fail)
    assert not list(cache.iterdir())


def test_another_process_was_faster(cache: Path) -> None:
    def slow(partial: Path) -> None:
        write(partial)
        (cache / "a").mkdir()
        (cache / "a" / "weights").write_bytes(b"theirs")

    assert (build_once("a", slow) / "weights").read_bytes() == b"theirs"
    assert [path.name for path in cache.iterdir()] == ["a"]


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.write_bytes(b"a file")
    with pytest.raises(PlanishError, match="PLANISH_CACHE"):
        build_once("a", write)


def test_content_hash(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    assert content_hash([tmp_path / "a"]) == content_hash([tmp_path / "b"]) != content_hash([tmp_path / "c"])
    assert len(content_hash([])) == 16
