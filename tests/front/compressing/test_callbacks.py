"""Callbacks hear of stages, blocks and results; the example of docs/logging.md runs."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers_compress import quick

import planish
from planish.walk.records import BlockRecord

DOCS = Path(__file__).parents[3] / "docs"


class Recorder(planish.Callback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.stages: list[str] = []
        self.blocks: list[int] = []
        self.metrics: dict[str, float] = {}

    def stage(self, name: str, steps: int) -> None:
        self.stages.append(name)

    def on_block(self, record: BlockRecord) -> None:
        self.blocks.append(record.index)
        if self.stop_after == record.index:
            raise RuntimeError("enough")

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)


def test_callbacks_hear_all(original: Path, tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    result = planish.compress(quick("w8a8"), original, tmp_path / "out", callbacks=[one, two])
    assert one.stages == ["checking weights", "blocks", "writing and reloading"]
    assert one.blocks == [block.index for block in result.blocks] == [0, 1, 2]
    assert one.metrics == {"bits_per_weight": result.bits_per_weight, "bytes": result.stored_bytes, "seconds": result.seconds}
    assert vars(one) == vars(two)


def test_a_run_that_goes_on_tells_of_all_blocks(original: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"):
        planish.compress(quick("w8a8"), original, tmp_path / "out", callbacks=[Recorder(stop_after=1)])
    again = Recorder()
    planish.compress(quick("w8a8"), original, tmp_path / "out", callbacks=[again])
    assert again.blocks == [0, 1, 2]


def test_example_of_the_docs(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", (DOCS / "logging.md").read_text(), re.DOTALL)
    assert found
    exec(found[1], {"recipe": quick("w8a8"), "model": original, "out": tmp_path / "out"})
    assert re.search(r"block 2: error 0\.\d+\n(.*\n)*bits_per_weight: 8\.", capsys.readouterr().out)
