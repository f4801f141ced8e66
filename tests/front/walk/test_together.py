"""flat with objective block: exact, nearer to the original than its start, and the same after a resume."""

from pathlib import Path

import pytest
from helpers_compress import outlying, quick, source
from helpers_front import tree

import planish
from planish.quant.errors import PlanishError
from planish.recipe.schema import Recipe
from planish.walk.callbacks import Silent


def learned(steps: int = 12, *settings: str) -> Recipe:
    flat = f'{{"flat":{{"objective":"block","structure":"blocks","block":8,"start":"identity","steps":{steps},"lr":0.02}}}}'
    return quick("w4a4-fast", "calibration.samples=8", "calibration.length=64", f'steps=[{{"shift":{{}}}},{flat}]', *settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_a_model_comes_nearer_to_its_original(family: str, tmp_path: Path) -> None:
    """The first block's output is off by less than with nothing learned; and the readers stay what they were before rounding."""
    model = source(family, tmp_path / "model")
    start, done = (planish.compress(learned(steps), model, tmp_path / f"out{steps}") for steps in (0, 32))
    errors = [result.blocks[0].error for result in (start, done)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < errors[0]
    assert all(block.equivalence < 1e-4 for block in done.blocks)


class Stop(Exception):
    """Ends a run."""


class Stopping(Silent):
    """Stops after the first block."""

    def stage(self, name: str, steps: int) -> None:
        self.blocks = name == "blocks"

    def step(self, done: int, note: str = "") -> None:
        if self.blocks:
            raise Stop


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = outlying(tmp_path / "model")
    whole = planish.compress(learned(), model, tmp_path / "whole")
    with pytest.raises(Stop):
        planish.compress(learned(), model, tmp_path / "cut", progress=Stopping())
    cut = planish.compress(learned(), model, tmp_path / "cut")
    assert cut.blocks == whole.blocks
    assert tree(cut.out)["model.safetensors"] == tree(whole.out)["model.safetensors"]


def test_one_batch_is_nothing_to_judge_by() -> None:
    with pytest.raises(PlanishError, match="flat with objective block is to be judged by text that is held out, but calibration has one batch"):
        quick("w4a4-fast", 'steps=[{"flat":{"objective":"block"}}]', "calibration.batch_size=4")
