"""planish.common.outfile: what cannot be written, or would be written over by its own command, is refused before the work."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers_front import SHORT, invoke, tree

from planish.common.outfile import check_apart, check_outfile, check_writable
from planish.quant.errors import PlanishError


def test_files_of_one_command_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_apart({})
    check_apart({"--html": Path("a.html"), "--markdown": Path("a.md"), "--out": None, "--recipe": None})
    check_apart({"--out": Path("new"), "--html": Path("new.html"), "--markdown": Path("pages/new.md")})


@pytest.mark.parametrize(
    ("html", "words"),
    [
        ("x", "--out and --html are both"),
        ("./x", "--out and --html are both"),
        ("sub/../x", "--out and --html are both"),
        ("link", "--out and --html are both"),
        ("x/page.html", "--html x/page.html: lies where --out x is made"),
        ("x.partial", "--html x.partial: lies where --out x is made"),
        ("x.partial/page.html", "lies where --out x is made"),
    ],
)
def test_one_place_for_two_is_refused(html: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(PlanishError, match=words):
        check_apart({"--out": Path("x"), "--html": Path(html), "--markdown": None})


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    """A link that leads nowhere is there too; a folder is no file, whatever may be replaced."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(PlanishError, match=f"{name}: exists, and planish overwrites nothing unasked"):
            check_outfile(tmp_path / name)
        check_outfile(tmp_path / name, replace=True)
    check_outfile(tmp_path / "new")
    for replace in (False, True):
        with pytest.raises(PlanishError, match="is a folder"):
            check_outfile(tmp_path, replace=replace)
        with pytest.raises(PlanishError, match="there is no folder"):
            check_outfile(tmp_path / "no" / "file", replace=replace)
    with pytest.raises(PlanishError, match="file is a file"):
        check_writable(tmp_path / "file" / "streams")


def test_offload_folder_that_cannot_be_written(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    make = tempfile.TemporaryFile

    def refusing(dir: Path) -> Any:
        if Path(dir) == folder:
            raise OSError(30, "Read-only file system")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    before = tree(tmp_path)
    for command in (
        ("compress", "w8a8", "--model", original, "--out", tmp_path / "new", *SHORT, "--offload-dir", folder / "streams"),
        ("inspect", original, "--samples", "2", "--offload-dir", folder),
    ):
        ran = invoke(*command)
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
        assert "locked cannot be written (Read-only file system)" in ran.err
    assert tree(tmp_path) == before
