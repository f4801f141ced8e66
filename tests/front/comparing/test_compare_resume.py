"""A comparison that is stopped leaves no process behind and goes on where it was; one that is refused says why, before anything runs."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_compare import MEASURE
from helpers_compare import here as here
from helpers_front import SHORT, invoke, start, tree, wait_for
from helpers_text import build_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from planish.common.texts import named_texts
from planish.comparing import parent as compare_parent
from planish.comparing.folder import Folder
from planish.comparing.report import Done
from planish.quant.errors import PlanishError
from planish.recipe.schema import load_recipe, with_settings
from planish.recipe.variants import named_recipes

BLOCKS = 12
SETTINGS = ("--set", "calibration.samples=16", "--set", "calibration.length=128", *MEASURE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with more blocks, so that there is time to interrupt."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    model = tiny("llama", changes={"vocab_size": 400, "num_hidden_layers": BLOCKS}).to(torch.bfloat16)
    model.config.dtype = model.dtype
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    """Whether all of them end soon."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
@pytest.mark.usefixtures("here")
def test_interrupted(how: signal.Signals, deep: Path, tmp_path: Path) -> None:
    """The second recipe is stopped at a block: nothing runs on, the first is not done again, the second goes on and is said to."""
    command = ("compare", "w8a8", "--model", deep, "--out", tmp_path / "out", *SETTINGS)
    assert invoke(*command).code == 0
    kept = (tmp_path / "out" / "results" / "w8a8.json").read_bytes()
    process = start(*command, "w4a8", folder=tmp_path)
    wait_for(tmp_path / "out" / "working", process)
    while not list((tmp_path / "out" / "working").glob("w4a8-*.partial/block-00001.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert gone(children)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == f"Stopped. 1 of 2 recipes are done, in {tmp_path / 'out'}: the same command goes on from there."
        assert "Traceback" not in err
    ran = invoke(*command, "w4a8")
    assert ran.code == 0, ran
    assert "going on: 1 of 2 recipes are done" in ran.err
    assert re.search(rf"w4a8: going on: \d+ of {BLOCKS} blocks are done", ran.err)
    assert "w8a8: blocks" not in ran.err
    assert "w4a8: was interrupted" in ran.out
    assert (tmp_path / "out" / "results" / "w8a8.json").read_bytes() == kept
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [(row["recipe"], row["resumed"]) for row in rows] == [("w8a8", False), ("w4a8", True)]
    assert not (tmp_path / "out" / "working").exists()


@pytest.mark.usefixtures("here")
def test_recipes_and_checkpoints_can_be_added(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("compare", "--model", original, "--out", "out", *SHORT, *MEASURE)
    assert invoke(*command, "w8a8").code == 0
    ran = invoke(*command, "w4a8", "w8a8", "--json")
    assert (ran.code, "w8a8: blocks" in ran.err) == (0, False)
    assert [row["recipe"] for row in json.loads(ran.out)["rows"]] == ["w4a8", "w8a8"]
    assert not Path("out/checkpoints").exists()
    ran = invoke(*command, "w4a8", "w8a8", "--keep")
    assert (ran.code, "w8a8: blocks" in ran.err) == (0, True)
    assert {path.name for path in Path("out/checkpoints").iterdir()} == {"w4a8", "w8a8"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_a_finished_checkpoint_is_measured_and_not_made_again(
    keep: tuple[str, ...], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time and memory are known from before."""
    monkeypatch.chdir(tmp_path)
    command = ("compare", "w8a8", "--model", original, "--out", "out", *SHORT, *MEASURE, *keep)

    add = Folder.add

    def stop(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    def add_and_stop(folder: Folder, name: str, done: Done) -> None:
        add(folder, name, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if keep:  # the checkpoint is measured, but has not got its place yet
            patch.setattr(Folder, "add", add_and_stop)
        else:
            patch.setattr("planish.comparing.child.compare_with", stop)
        ran = invoke(*command)
    assert (ran.code, ran.err.splitlines()[-1][:32]) == (130, "Stopped. 0 of 1 recipes are done")
    (clock,) = Path("out/working").glob("*.clock.json")
    taken = json.loads(clock.read_text())
    ran = invoke(*command)
    assert (ran.code, "w8a8: blocks" in ran.err, "w8a8: texts" in ran.err) == (0, False, True)
    (row,) = json.loads(Path("out/comparison.json").read_text())["rows"]
    assert {key: row[key] for key in taken} == taken
    assert not Path("out/working").exists()


@pytest.mark.usefixtures("here")
def test_another_comparison_is_refused(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = ("--dtype", "bfloat16", "--quiet")
    assert invoke("compare", "w8a8", "--model", original, *SHORT, *MEASURE, *half).code == 0
    before = tree(tmp_path)
    for arguments, words in (
        (("w8a8", *SHORT, "--windows", "2", "--length", "32", *half), "not the same texts (their --windows and --length count too). Repeat"),
        (("w8a8", *SHORT, *MEASURE, "--dtype", "float32", "--quiet"), "not the same arithmetic (bfloat16 there, float32 now). Repeat"),
        (("w4a8", *SHORT, *MEASURE, *half), "a result of another recipe w8a8"),
        (("w8a8", *MEASURE, "--set", "calibration.samples=2", "--set", "calibration.length=64", *half), "with other settings"),
    ):
        ran = invoke("compare", *arguments, "--model", original)
        assert (ran.code, words in ran.err) == (2, True), ran
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("w8a8", "w8a8"), "two recipes are named w8a8"),
        (("w8a8", "w4a16-g128", "--set", "group_fallback=refuse"), "does not divide"),
        (("w8a8", "nothing"), "neither a shipped recipe nor a file"),
        (("w8a8", "--set", "solver.rtn.damping=1"), "damping"),
        (("w8a8", "--text", "builtin"), "measured anyway"),
        (("w8a8", "--text", "=wiki.txt"), "Write NAME=FILE"),
        (("w8a8", "--text", "a=one.txt", "--text", "a=two.txt"), "a text named a already"),
        (("w8a8", "--text", "wiki=missing.txt"), "missing.txt"),
        (("w8a8", "--out", "there"), "is no comparison"),
        (("w8a8", "--device", "tpu"), "tpu"),
        (("w8a8", "--vary", "calibration.samples=4,4"), "stands there twice"),
        (("w8a8", "--vary", "solver.rtn.damping=0.1,0.2"), "damping"),
    ],
)
def test_refused_before_anything_runs(
    arguments: tuple[str, ...], words: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    before = tree(tmp_path)
    ran = invoke("compare", "--model", original, *SHORT, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert tree(tmp_path) == before


def test_what_a_child_refuses_has_the_recipes_name(model: Path, tmp_path: Path) -> None:
    """A NaN in a block that preflight does not look at."""
    (name, file), *_ = ((name, file) for file in model.glob("*.safetensors") for name in load_file(file) if "layers.1.mlp.down_proj" in name)
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    ran = invoke("compare", "w8a8", "--model", model, "--out", tmp_path / "out", *SHORT, *MEASURE, "--quiet")
    assert ran.code == 2
    assert "recipe w8a8: " in ran.err
    assert name in ran.err


def test_a_process_that_dies_is_said_to(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.comparing.parent._PROGRAM", "import os; os.kill(os.getpid(), 9)")
    ran = invoke("compare", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, *MEASURE, "--quiet")
    assert ran.code == 2
    assert "recipe w8a8: its process was ended by SIGKILL" in ran.err
    monkeypatch.setattr("planish.comparing.parent._PROGRAM", "raise ValueError('a bug')")
    with pytest.raises(RuntimeError, match="a bug"):
        invoke("compare", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, *MEASURE, "--quiet")


def test_a_process_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_parent, "GRACE", 0.1)
    command = ["sleep", "60"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    compare_parent._stop(process)
    assert process.returncode == -signal.SIGKILL


def test_names_of_recipes_become_names_of_files() -> None:
    names = [with_settings(load_recipe("w8a8"), [f"name={name!r}"]) for name in ("a/b c", "..", "Ärger-8")]
    assert list(named_recipes(names, ())) == ["a-b-c", "recipe", "Ärger-8"]
    assert named_texts(["texts/wiki.txt", "b=x=y.txt"]) == {"builtin": "builtin", "wiki": "texts/wiki.txt", "b": "x=y.txt"}
    with pytest.raises(PlanishError, match="needs recipes"):
        named_recipes([], ())
