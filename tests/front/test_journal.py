"""The journal of a run: what it reads back, and what it refuses."""

from pathlib import Path

import pytest
import torch

from planish.journal import Journal
from planish.quant.errors import PlanishError
from planish.records import BlockRecord, SiteRecord


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


DAMAGED = ("", "{", "[]", "{}", '{"fingerprint": "mine", "blocks": [[]]}', '{"fingerprint": "mine", "blocks": [{"sites": {}}]}')


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_journal_is_one_message(text: str, tmp_path: Path) -> None:
    Journal.open(tmp_path / "work", "mine")
    (tmp_path / "work" / "journal.json").write_text(text)
    with pytest.raises(PlanishError, match=r"journal\.json: damaged .* Delete the folder"):
        Journal.open(tmp_path / "work", "mine")
