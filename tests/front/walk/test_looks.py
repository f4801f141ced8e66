"""What recipes share of a model's full-precision run: never a bit of the result, and only what both would see."""

from pathlib import Path
from typing import Any

import pytest
from helpers_compare import MEASURE, run_here
from helpers_compress import outlying, quick
from helpers_front import SHORT, invoke

from planish.comparing.plan import plan_comparison
from planish.compressing.compression import carry_out
from planish.planning.preflight import make_plan
from planish.recipe.schema import Recipe
from planish.walk import block as blocks

BLOCKS = 3
ALL = list(range(BLOCKS))


class Ticker:
    """Progress that nobody sees."""

    def say(self, text: str) -> None: ...
    def stage(self, name: str, steps: int) -> None: ...
    def step(self, done: int, note: str = "") -> None: ...


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outlying(tmp_path_factory.mktemp("looks") / "model")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were looked at."""
    seen: list[int] = []
    observe = blocks.observe

    def counting(block: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(index)
        return observe(block, index, *args, **kwargs)

    monkeypatch.setattr(blocks, "observe", counting)
    return seen


def written(recipe: Recipe, model: Path, out: Path, looks: Path | None, **kwargs: Any) -> dict[str, bytes]:
    """The files of the checkpoint made, without what tells the time."""
    carry_out(make_plan(recipe, model, **kwargs), out, Ticker(), looks)
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    ("one", "two", "looked"),
    [
        (("w8a8",), ("w8a8-static",), []),
        (("w8a8",), ("w4a8",), []),  # whose solver compares with full precision: it needs what entered each block
        (("w4a4-fast",), ("w4a4-best",), []),
        (("w4a8",), ("w4a4-fast",), ALL),  # a prefix before every sample
        (("w8a8",), ("w8a8", "calibration.seed=1"), ALL),
        (("w8a8",), ("w8a8", "calibration.batch_size=1"), ALL),
        (("w8a8",), ("w8a8", "steps=[fold_norms, {rotate: {at: residual}}]"), ALL),
        (("w8a8",), ("w8a8", "steps=[{scale_rms: {exponent: 0.5}}]"), ALL),  # which asks for squares
    ],
    ids=lambda given: "-".join(map(str, given)),
)
def test_the_second_recipe_finds_what_the_first_saw(
    one: tuple[str, ...], two: tuple[str, ...], looked: list[int], rough: Path, tmp_path: Path, counted: list[int]
) -> None:
    looks = tmp_path / "looks"
    first = written(quick(*one), rough, tmp_path / "first", looks)
    assert counted == ALL
    found = written(quick(*two), rough, tmp_path / "found", looks)
    assert counted == ALL + looked
    assert found == written(quick(*two), rough, tmp_path / "found alone", None)
    assert first == written(quick(*one), rough, tmp_path / "first alone", None)
    assert found != first


def test_on_disk_and_after_an_interruption(rough: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stopped in its second block goes on, its activations on disk, with looks that another one left."""
    looks, recipe = tmp_path / "looks", quick("w8a8")
    expected = written(recipe, rough, tmp_path / "first", looks)
    compress = blocks.BlockCompressor.compress

    def stopping(self: blocks.BlockCompressor, index: int) -> blocks.BlockResult:
        if index == 1:
            raise KeyboardInterrupt
        return compress(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockCompressor, "compress", stopping)
        with pytest.raises(KeyboardInterrupt):
            written(recipe, rough, tmp_path / "out", looks, offload_dir=tmp_path)
    assert written(recipe, rough, tmp_path / "out", looks, offload_dir=tmp_path) == expected
    assert counted == ALL


def test_compare_shares_among_those_that_see_the_same(rough: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.comparing.job.run_child", run_here)
    recipes = ("w8a8", "w4a8", "w4a4-fast", "w4a4-best", "paper-quarot")
    ran = invoke("compare", *recipes, "--model", rough, "--out", tmp_path / "out", *SHORT, "--set", "calibration.batch_size=2", *MEASURE)
    assert ran.code == 0, ran
    assert counted == 3 * ALL  # w8a8 and w4a8, w4a4-fast and w4a4-best, paper-quarot
    assert not list((tmp_path / "out").rglob("looks*"))
    plan = plan_comparison(
        {name: quick(name, "calibration.batch_size=2") for name in recipes},
        str(rough),
        {"builtin": "builtin"},
        windows=1,
        length=32,
        device=None,
        dtype=None,
        offload_dir=None,
        allow_pickle=False,
    )
    shared = plan.sharing(recipes)
    assert set(shared) == set(recipes[:4])
    assert plan.sharing(["w8a8", "w4a4-best"]) == {}
    alone = plan.disk(["w8a8"], keep=False)
    hidden = 4 * 32 * plan.checkpoint.config.hidden_size * plan.plans["w8a8"].dtype.itemsize
    assert plan.disk(["w8a8", "w4a8"], keep=False) >= alone + BLOCKS * hidden
