"""Activation streams: in memory and on disk they are the same."""

from pathlib import Path

import pytest
import torch

from planish.calib.walk.stream import Stream, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_disk_are_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    streams = [Stream(), Stream(tmp_path / "a" / "stream")]
    batches = [torch.randn(2, 3 + i, 4).to(dtype) for i in range(3)]
    for stream in streams:
        assert len(stream) == 0
        assert list(stream) == []
        for i, batch in enumerate(batches):
            stream[i] = batch
        stream[1] = batches[1].transpose(0, 1)
        assert len(stream) == 3
        for index in (-1, 3):
            with pytest.raises(IndexError):
                stream[index]
    for one, other in zip(*streams, strict=True):
        assert one.dtype is other.dtype is dtype
        assert torch.equal(one, other)
    assert torch.equal(streams[1][1], batches[1].transpose(0, 1))


def test_nothing_half_written_on_disk(tmp_path: Path) -> None:
    stream = Stream(tmp_path)
    for _ in range(2):
        stream[0] = torch.ones(2)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.safetensors"]


def test_a_batch_read_from_disk_is_its_own(tmp_path: Path) -> None:
    """Changing what was read, or writing anew, changes nobody else's copy."""
    stream = Stream(tmp_path)
    stream[0] = torch.ones(3)
    read = stream[0]
    stream[0] = torch.zeros(3)
    assert torch.equal(read, torch.ones(3))
    read += 1
    assert torch.equal(stream[0], torch.zeros(3))


def test_relative_error() -> None:
    one = torch.tensor([3.0, 4.0])
    assert relative_error(one, one) == 0
    assert relative_error(one, torch.zeros(2)) == pytest.approx(1)
    assert relative_error(one.bfloat16(), one.bfloat16() * 1.5) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.zeros(2), one) == 1
    assert not relative_error(one, torch.tensor([float("nan"), 4.0])) <= 1e9
