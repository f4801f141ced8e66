"""What a budget allows: bits, bytes, and the speed that fewer bytes to read make."""

from pathlib import Path

import pytest
import torch
from helpers_compress import source

from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.quant.errors import PlanishError
from planish.searching.budget import Budget, Weights

WEIGHTS = Weights(chosen=1000, itemsize=2, fixed=700, read=500)


def test_bits_and_bytes() -> None:
    assert Budget.of("4.5 bpw").allowance(WEIGHTS) == 562
    assert Budget.of("1kB").allowance(WEIGHTS) == 300
    assert Budget.of("80MB").number == 80_000_000
    assert WEIGHTS.bits(500) == 4
    assert WEIGHTS.whole(500) == 1200


def test_a_speed_is_bytes_to_read() -> None:
    assert Budget.of("2x").allowance(WEIGHTS) == 2500 / 2 - 500
    assert WEIGHTS.speedup(750) == 2
    assert Budget.of("1000 tok/s", "1MB/s").allowance(WEIGHTS) == 500
    assert Budget.of("4x").allowance(WEIGHTS) > 0 > Budget.of("6x").allowance(WEIGHTS)


def test_the_least_that_can_be_asked_for() -> None:
    for text, bandwidth in (("3bpw", None), ("0.1kB", None), ("9x", None), ("9999tok/s", "1MB/s")):
        words = Budget.of(text, bandwidth).least(WEIGHTS, 510)
        asked = words.split(" or ")[0].rpartition(" ")[2]
        if text != "0.1kB":
            assert Budget.of(asked, bandwidth).allowance(WEIGHTS) >= 510


@pytest.mark.parametrize(
    ("text", "bandwidth", "message"),
    [
        ("4.5", None, "Write bits per weight"),
        ("0x", None, "Write bits per weight"),
        ("-1bpw", None, "Write bits per weight"),
        ("60tok/s", None, "say what the memory gives"),
        ("60tok/s", "50", "bandwidth '50' is none"),
        ("2x", "50GB/s", "Leave it out"),
    ],
)
def test_what_is_refused(text: str, bandwidth: str | None, message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        Budget.of(text, bandwidth)


def test_an_embedding_table_is_read_only_where_it_is_the_head(tmp_path: Path) -> None:
    for tied in (True, False):
        checkpoint = open_checkpoint(source("llama", tmp_path / str(tied), changes={"tie_word_embeddings": tied}))
        assert checkpoint.tied is tied
        weights = Weights.of(BlockRunner(checkpoint, torch.float32, torch.device("cpu")), 1000)
        assert weights.fixed == checkpoint.nbytes - 1000 * checkpoint.dtype.itemsize
        table = checkpoint.info("model.embed_tokens.weight").nbytes
        assert weights.fixed - weights.read == (0 if tied else table)
