"""planish compare on a tiny model: its numbers are those of compress and verify, it goes on where it was, and it refuses before it works."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_compare import MEASURE, run_here
from helpers_compress import quick
from helpers_front import SHORT, Ran, invoke, tree
from jsonschema import Draft202012Validator

import planish as front
from planish.calib.compressed.stored import open_stored
from planish.calib.data.windows import Calibration
from planish.calib.machine.workers import threads
from planish.common.decode import decode
from planish.common.page_links import about
from planish.comparing.job import CompareJob
from planish.comparing.report import ComparisonReport

Planish = Callable[..., Ran]
WORDS = "A blacksmith planishes a sheet of copper: light blows, and the bumps are gone. " * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "copper.txt"
    file.write_text(WORDS)
    return file


@pytest.fixture(scope="module")
def finished(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """w8a8 and w4a8 on two texts, with checkpoints; what was printed and the folder. Not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planish.comparing.job.run_child", run_here)
        return invoke("compare", "w8a8", "w4a8", "--model", original, "--out", out, "--text", f"smith={text}", *SHORT, *MEASURE, "--keep"), out


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def test_what_it_says_and_writes(finished: tuple[Ran, Path]) -> None:
    ran, out = finished
    assert ran.code == 0, ran
    for words in ("w8a8", "w4a8", "full precision", "builtin", "smith", "KL 0.", "transformers", "comparison.md"):
        assert words in ran.out
    for words in ("in all", "w8a8: blocks 3/3", "w8a8: texts 4/4", "1 of 2 recipes, about", "2 of 2 recipes)"):
        assert words in ran.err
    assert sorted(path.name for path in out.iterdir()) == [
        *("about.json", "checkpoints", "comparison.html", "comparison.json", "comparison.md", "comparison.svg", "results"),
    ]
    assert ran.out.count("best: w8a8") == 1
    page = (out / "comparison.html").read_text()
    assert "w4a8</text>" in page
    assert about(out / "comparison.html") == f"compare: {report(out)['model']}"
    table = [line for line in (out / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table] == ["recipe", "---", "(full", "w8a8", "w4a8"]
    assert len({line.count("|") for line in table}) == 1
    assert "w4a8</text>" in (out / "comparison.svg").read_text()


def test_json_is_as_documented(finished: tuple[Ran, Path]) -> None:
    data = report(finished[1])
    schema = json.loads(invoke("compare", "--schema").out)
    assert not list(Draft202012Validator(schema).iter_errors(data))
    found = decode(ComparisonReport, data, "report", nonfinite=True)
    assert found.planish == front.__version__
    assert [text.name for text in found.texts] == ["builtin", "smith"]
    assert [(text.windows, text.length) for text in found.texts] == [(2, 64), (2, 64)]
    assert found.base.bits == 16
    for row in found.rows:
        assert row.checkpoint is not None
        assert row.bytes == sum(info.nbytes for info in open_stored(row.checkpoint).tensors.values())
        assert row.seconds > 0
        assert 10**8 < row.peak_bytes < 2 * 10**9
        assert not row.resumed
        for name, quality in row.quality.items():
            assert quality.change == pytest.approx(quality.perplexity / found.base.perplexity[name] - 1)
    assert found.rows[0].quality["smith"].kl < found.rows[1].quality["smith"].kl


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_the_numbers_are_those_of_compress_and_verify(recipe: str, finished: tuple[Ran, Path], planish: Planish, original: Path, text: Path) -> None:
    _, out = finished
    assert planish("compress", recipe, "--model", original, "--out", "alone", *SHORT, "--no-evaluate", "--quiet").code == 0
    assert tree(Path("alone")) == tree(out / "checkpoints" / recipe)
    (row,) = (row for row in report(out)["rows"] if row["recipe"] == recipe)
    for name, source in (("builtin", "builtin"), ("smith", text)):
        checked = json.loads(planish("verify", "alone", "--against", original, "--text", source, *MEASURE, "--no-transformers", "--json").out)
        (against,) = (check["figures"] for check in checked["checks"] if check["name"] == "against")
        assert (row["quality"][name]["perplexity"], row["quality"][name]["kl"]) == (against["perplexity"], against["kl"])
        assert report(out)["base"]["perplexity"][name] == against["perplexity_base"]


@pytest.mark.smoke
def test_from_python_with_one_text(original: Path, tmp_path: Path) -> None:
    """In a real process; and what is done is not done again."""
    told = Told()
    recipes = [quick("w8a8", "name=nearest", "solver=rtn", "steps=[]", "calibration=null")]
    found = front.compare(recipes, original, tmp_path / "out", windows=1, length=32, progress=told)
    assert [row.recipe for row in found.rows] == ["nearest"]
    assert found.rows[0].calibration_sha256 is None
    assert found.rows[0].checkpoint is None
    assert any("One text only" in note for note in found.notes)
    assert told.stages == ["full precision: texts", "nearest: blocks", "nearest: texts"]
    assert not (tmp_path / "out" / "checkpoints").exists()
    before = tree(tmp_path / "out" / "results")
    again = front.compare(recipes, original, tmp_path / "out", windows=1, length=32, progress=(silent := Told()))
    assert (again.rows, silent.stages, tree(tmp_path / "out" / "results")) == (found.rows, [], before)


@pytest.mark.slow
def test_side_by_side_finds_the_same(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes at once, against one after the other in this one with as many threads."""
    recipes, told = [quick("w8a8"), quick("w4a16-channel")], Told()
    with threads(2):
        found = front.compare(recipes, original, tmp_path / "two", vary=["calibration.seed=0,1"], windows=1, length=32, jobs=2, progress=told)
    monkeypatch.setattr("planish.comparing.job.run_child", run_here)
    with threads(1):
        alone = front.compare(recipes, original, tmp_path / "one", vary=["calibration.seed=0,1"], windows=1, length=32)
    assert (found.jobs, found.threads, alone.jobs, alone.threads) == (2, 1, 1, 1)
    assert told.stages == ["full precision: texts", "recipes"]
    assert [row.recipe for row in found.rows] == [f"{name}-seed={seed}" for name in ("w8a8", "w4a16-channel") for seed in (0, 1)]
    assert [(row.recipe, row.quality, row.bytes) for row in found.rows] == [(row.recipe, row.quality, row.bytes) for row in alone.rows]
    assert found.base == alone.base


class Told:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage(self, name: str, steps: int) -> None:
        assert steps > 0
        self.stages.append(name)

    def step(self, done: int, note: str = "") -> None:
        assert done > 0
        assert isinstance(note, str)


def test_tokens_are_made_once(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Calibration] = []
    tokens = Calibration.tokens

    def counted(self: Calibration, tokenizer: Any) -> Any:
        made.append(self)
        return tokens(self, tokenizer)

    monkeypatch.setattr(Calibration, "tokens", counted)
    recipes = {"a": quick("w8a8"), "b": quick("w4a8", "calibration.batch_size=1"), "c": quick("w4a8", "calibration.seed=5")}
    plan = CompareJob(recipes=recipes, model=str(original), out=tmp_path / "out", texts={"builtin": "builtin"}).plan()
    assert [one.seed for one in made] == [0, 5]
    assert plan.plans["a"].ids is plan.plans["b"].ids
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_peak_memory_is_ones_own() -> None:
    """A process that a large one started does not report the large one's peak."""
    small = "from planish.compressing.reporting import peak_bytes; print(peak_bytes())"
    large = f"import subprocess, sys; ballast = b'1' * 1_500_000_000; print(subprocess.check_output([sys.executable, '-c', {small!r}]).decode())"
    found = subprocess.check_output([sys.executable, "-c", large], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert 10**8 < int(found) < 1.2e9


@pytest.mark.slow
@pytest.mark.demo
def test_demo(planish: Planish, tmp_path: Path) -> None:
    """Two recipes on a real model: the better one is better on both texts, and neither costs more than compress says."""
    (tmp_path / "smith.txt").write_text(WORDS)
    measure = ("--text", "smith=smith.txt", "--windows", "1", "--length", "512", "--set", "calibration.samples=8", "--set", "calibration.length=256")
    ran = planish("compare", "w8a8", "w4a8", "--model", "demo:smollm2", *measure, "--json")
    assert ran.code == 0, ran
    found = decode(ComparisonReport, json.loads(ran.out), "report", nonfinite=True)
    good, coarse = found.rows
    for text in ("builtin", "smith"):
        assert good.quality[text].kl < 0.03 < coarse.quality[text].kl
    assert abs(good.quality["builtin"].change) < 0.03
    assert good.peak_bytes < 2e9
    assert coarse.bytes < 0.65 * found.base.bytes
    assert not (tmp_path / "comparison" / "working").exists()
