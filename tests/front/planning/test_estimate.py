"""The estimate of what a run takes: its parts follow the recipe and where the streams lie, and what the process holds is measured."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers_compress import quick, source

from planish.calib.files.checkpoint import open_checkpoint
from planish.planning.estimate import SOFTMAX, Memory, evaluating_seconds, resident
from planish.planning.preflight import Plan, make_plan
from planish.quant.solvers import Rtn
from planish.recipe.schema import Recipe

TOKENS, WIDTH, INNER = 4 * 32, 64, 512  # of helpers_compress.QUICK and of the model below: so wide inside that down takes most


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source("llama", tmp_path_factory.mktemp("models") / "tiny", changes={"intermediate_size": INNER})


def plan(recipe: Recipe, folder: Path, offload_dir: Path | None = None) -> Plan:
    return make_plan(recipe, folder, device="cpu", dtype=torch.bfloat16, offload_dir=offload_dir)


def test_total_is_the_sum_of_the_parts() -> None:
    assert Memory(program=1, weights=20, streams=300, waiting=4000, passing=50000, solver=600000, holes=7000000).total == 7654321


def test_program_is_what_the_process_holds(folder: Path) -> None:
    before = resident()
    found = plan(quick("w8a8"), folder).memory.program
    assert before - 100e6 < found < before + 300e6
    held = torch.ones(50 << 20)  # 200 MB
    assert 150e6 < plan(quick("w8a8"), folder).memory.program - found < 250e6
    assert held.sum() == held.numel()


def test_parts_follow_the_recipe(folder: Path) -> None:
    """In bfloat16. At down each token waits with its input, its codes, its residual and the norm of that; with GPTAQ the twin's token too."""
    gptq, gptaq, weight_only = (plan(quick(name), folder).memory for name in ("w8a8", "w4a8", "w4a16-channel"))
    assert [memory.streams for memory in (gptq, gptaq, weight_only)] == [TOKENS * WIDTH * 2 * streams for streams in (2, 3, 3)]
    plain = (INNER + 2 * WIDTH) * 2
    assert [memory.waiting for memory in (gptq, gptaq, weight_only)] == [TOKENS * held for held in (plain + INNER, 2 * plain + INNER, 2 * plain)]
    assert gptaq.solver - gptq.solver == 2 * 4 * INNER**2
    assert gptq.solver > 4 * 4 * INNER**2


def test_learning_takes_time_and_a_sample(folder: Path) -> None:
    few, many, wide = (plan(quick("w4a4-best", f"steps=[flat: {{{settings}}}]"), folder) for settings in ("steps: 1", "steps: 1000", "tokens: 16"))
    assert many.seconds > 5 * few.seconds
    assert few.memory.solver - wide.memory.solver == 3 * 4 * INNER * (TOKENS - 16)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_each_worker_has_a_batch_on_its_way(folder: Path, tmp_path: Path, threads: Callable[[int], None]) -> None:
    found = {}
    for count in (1, 2, 64):
        threads(count)
        found[count] = plan(quick("w8a8"), folder, tmp_path)
    one, two, many = (found[count].memory for count in found)
    assert (two.passing, two.waiting) == (2 * one.passing, 2 * one.waiting) == (many.passing, many.waiting)  # no more workers than batches
    assert found[2].evaluation.passing >= found[1].evaluation.passing


def test_what_lies_on_disk_is_not_in_memory(folder: Path, tmp_path: Path, threads: Callable[[int], None]) -> None:
    threads(1)
    here, there = plan(quick("w8a8"), folder), plan(quick("w8a8"), folder, tmp_path)
    assert (there.offload, there.replay) == (True, True)
    assert (there.memory.streams, there.memory.holes) == (0, 0)
    assert there.memory.waiting * 2 == here.memory.waiting  # one batch of the two
    assert there.disk - here.disk == TOKENS * WIDTH * 2 * 2


def test_no_text_takes_no_streams(folder: Path) -> None:
    memory = plan(Recipe(name="plain", calibration=None, scheme=quick("w4a16-channel").scheme, solver=Rtn()), folder).memory
    assert memory.streams == memory.waiting == memory.passing == 0
    assert memory.total > memory.program


def test_evaluation_holds_both_heads_in_float32(folder: Path) -> None:
    found = plan(quick("w8a8"), folder).evaluation
    assert found.weights == 400 * WIDTH * (4 + 4 + 2)
    assert found.streams == 2 * 4 * 128 * WIDTH * 4


def test_attention_that_makes_all_scores_counts_them(tmp_path: Path, threads: Callable[[int], None]) -> None:
    threads(1)
    plain, eager = (plan(quick("w8a8", "calibration.length=128"), source(name, tmp_path / name)) for name in ("llama", "gemma2"))
    assert eager.memory.passing - plain.memory.passing == 2 * 4 * 128 * 128 * 8


def test_evaluation_takes_time_by_weights_and_attention(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of both models, counted by a clock that ticks once for each; an untied model's table of embeddings is not multiplied with."""
    monkeypatch.setattr("planish.planning.estimate.products_per_second", lambda _dtype, _device: 1.0)
    untied = source("llama", tmp_path / "untied", changes={"intermediate_size": INNER, "tie_word_embeddings": False})
    for path in (folder, untied):
        checkpoint = open_checkpoint(path)
        assert checkpoint.tied == (path == folder)
        weights = sum(weight.numel() for name, weight in checkpoint.skeleton().named_parameters() if "embed_tokens" not in name)
        found = evaluating_seconds(checkpoint, torch.device("cpu"))
        passes = 2 * (weights + 2 * 128 * WIDTH * checkpoint.config.num_hidden_layers)
        assert found == pytest.approx(4 * 128 * (passes + SOFTMAX * 400), rel=1e-3)
