"""The journal of a run: what it reads back, and what it refuses."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from planish.common.files import BusyError, locked, write_text
from planish.quant.errors import PlanishError
from planish.terminal.console import system_message
from planish.walk.journal import Journal
from planish.walk.records import BlockRecord, SiteRecord


def test_reads_back_what_was_added(tmp_path: Path) -> None:
    record = BlockRecord(0, error=0.25, sites={"qkv": SiteRecord(error=0.1, strength=0.6)})
    Journal.open(tmp_path / "work", "mine").add(record, {"a": torch.ones(2)})
    again = Journal.open(tmp_path / "work", "mine")
    assert again.blocks == [record]
    assert again.block_file(0).is_file()


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    Journal.open(tmp_path / "work", "mine")
    with pytest.raises(PlanishError, match="another recipe"):
        Journal.open(tmp_path / "work", "other")


@pytest.mark.parametrize("path", ["page.html", "journal.json"])
def test_a_full_disk_leaves_nothing_and_names_the_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(tmp_path / path, "words")
    assert not list(tmp_path.iterdir())
    assert caught.value.errno == errno.ENOSPC
    alone = system_message(caught.value, resumes=False)
    assert alone == f"{tmp_path / path}: the disk is full. Free some room and repeat the command."
    assert "a compression goes on" in str(system_message(caught.value))


def test_a_full_disk_for_tensors_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: object, file: Path, _metadata: object) -> None:
        file.write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    journal = Journal.open(tmp_path / "work", "mine")
    monkeypatch.setattr("planish.common.files.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*block-00000\.safetensors"):
        journal.add(BlockRecord(0, error=0.25, sites={}), {"a": torch.ones(2)})
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["journal.json"]
    assert not journal.blocks
    assert not Journal.open(tmp_path / "work", "mine").blocks


def test_a_half_written_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed amid writing: what was there stays, under its name."""
    journal = Journal.open(tmp_path / "work", "mine")
    journal.add(BlockRecord(0, error=0.25, sites={}), {"a": torch.ones(2)})
    before = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()}

    def killed(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "work" / "journal.json", "other")
    with pytest.raises(KeyboardInterrupt):
        journal.add(BlockRecord(0, error=0.5, sites={}), {"a": torch.zeros(2)})
    assert {name: (tmp_path / "work" / name).read_bytes() for name in before} == before


def test_what_has_its_name_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, dict[int, int]()

    def note(handle: int) -> None:
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", note)
    Journal.open(tmp_path / "work", "mine").add(BlockRecord(0, error=0.25, sites={}), {"a": torch.ones(2)})
    files = list((tmp_path / "work").iterdir())
    assert len(files) == 2
    assert all(synced.get(file.stat().st_ino) == file.stat().st_size for file in files)


def test_two_cannot_work_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BusyError, match="another planish is at work there"), locked(tmp_path):
        pass
    with locked(tmp_path):  # once the other is done
        pass


DAMAGED = (
    "",
    "{",
    "[]",
    "{}",
    '{"fingerprint": "mine", "blocks": [[]]}',
    '{"fingerprint": "mine", "blocks": [{"sites": {}}]}',
    '{"fingerprint": "mine", "blocks": [{"index": 0, "sites": []}]}',
)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_journal_is_one_message(text: str, tmp_path: Path) -> None:
    Journal.open(tmp_path / "work", "mine")
    (tmp_path / "work" / "journal.json").write_text(text)
    with pytest.raises(PlanishError, match=r"journal\.json: damaged .* Delete the folder"):
        Journal.open(tmp_path / "work", "mine")
