"""A run that is killed or interrupted goes on where it was, and ends in the same bytes as one that is not."""

import fcntl
import json
import signal
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import merge, rewrite
from helpers_compress import outlying, quick, source
from helpers_front import SHORT, invoke, start, tree, wait_for
from helpers_text import build_tokenizer
from tiny_models import tiny

import planish
from planish.calib.compressed.stored import open_stored
from planish.calib.machine.precision import working_dtype

BLOCKS = 16
SETTINGS = ("--set", "calibration.samples=16", "--set", "calibration.length=128", "--no-evaluate")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with more blocks, so that there is time to interrupt."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    model = tiny("llama", changes={"vocab_size": 400, "num_hidden_layers": BLOCKS}).to(torch.bfloat16)
    model.config.dtype = model.dtype
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert invoke("compress", "w8a8-static", "--model", deep, "--out", out, *SETTINGS).code == 0
    return tree(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted(how: signal.Signals, deep: Path, uninterrupted: dict[str, bytes | None], tmp_path: Path) -> None:
    command = ("compress", "w8a8-static", "--model", deep, "--out", tmp_path / "out", *SETTINGS, "--offload-dir", tmp_path / "streams")
    process = start(*command, folder=tmp_path)
    wait_for(tmp_path / "out.partial" / "block-00001.safetensors", process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    done = len(json.loads((tmp_path / "out.partial" / "journal.json").read_text())["blocks"])
    assert 1 <= done < BLOCKS
    assert not (tmp_path / "out").exists()
    if how is signal.SIGINT:
        assert err.splitlines()[-1] == (
            f"Stopped. {done} of {BLOCKS} blocks are done, in {tmp_path / 'out.partial'}: the same command goes on from there."
        )
        assert "Traceback" not in err
    ran = invoke(*command)
    assert ran.code == 0
    assert f"going on: {done} of {BLOCKS} blocks are done" in ran.err
    assert tree(tmp_path / "out") == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report.html", "out.report.json", "streams"]
    assert not tree(tmp_path / "streams")


@pytest.mark.parametrize(
    ("finder", "steps"),
    [
        ("walk.fused.learned", "fold_norms, rotate: {at: residual, kind: learned, steps: 2}, rotate: {at: value, kind: learned, steps: 2}"),
        ("walk.fused._ranges", "fold_norms, rotate: {at: residual, seeds: 3}"),
        ("compressing.compression.search_prefix", "prefix: {tokens: auto}"),
        ("walk.beside.search", "super_weight: {places: auto, z: 12}"),
        ("compressing.compression.decide", "hadamard, raise_activations: {bits: 8, share: 0.25}"),
    ],
)
def test_what_was_found_before_the_walk_is_not_searched_again(finder: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays what the finished blocks were made with, whatever a second search would find."""
    model, recipe = outlying(tmp_path / "model"), quick("w4a4-fast", f"steps=[{steps}]")

    def stop(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    planish.compress(recipe, model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(recipe, model, tmp_path / "out")
    monkeypatch.setattr(f"planish.{finder}", stop)
    planish.compress(recipe, model, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        planish.compress(recipe, model, tmp_path / "other")


def test_a_site_whose_sinks_leave_its_range_goes_on_as_dynamic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the text has a massive activation, which a static scale of ordinary tokens would clip."""
    model, recipe = source("llama", tmp_path / "model"), quick("w8a8-static", "steps=[]")
    ids = planish.plan(recipe, model).ids
    assert ids is not None
    tensors = merge(model)
    tensors["model.embed_tokens.weight"][:, 3] = 0.01
    tensors["model.embed_tokens.weight"][ids[0, 5], 3] = 5000
    tensors["model.layers.0.input_layernorm.weight"][3] = 10
    rewrite(model, tensors)
    result = planish.compress(recipe, model, tmp_path / "whole")
    record = result.blocks[0].sites["qkv"]
    assert record.made_dynamic
    assert "times the static range: dynamic per token instead" in record.note
    assert not result.blocks[0].sites["o"].made_dynamic
    stored, path = open_stored(tmp_path / "whole"), "model.layers.0.self_attn"
    kinds = [stored.packed[f"{path}.{name}"].scheme.activations for name in ("q_proj", "v_proj", "o_proj")]
    assert [(act.dynamic, act.granularity) for act in kinds if act] == [(True, "token"), (True, "token"), (False, "tensor")]
    assert f"{path}.q_proj.input_scale" not in stored.tensors

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(recipe, model, tmp_path / "out")
    planish.compress(recipe, model, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_recipe_does_not_go_on(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.write_checkpoint", stop)
        ran = invoke("compress", "w8a8-static", "--model", deep, "--out", tmp_path / "out", *SETTINGS, "--quiet")
    assert ran.code == 130
    assert ran.err.startswith(f"Stopped. {BLOCKS} of {BLOCKS} blocks")
    before = tree(tmp_path)
    ran = invoke("compress", "w8a8", "--model", deep, "--out", tmp_path / "out", *SETTINGS, "--quiet")
    assert ran.code == 2
    assert "another recipe" in ran.err
    assert tree(tmp_path) == before


def test_whoever_works_there_is_named_and_not_the_remains(original: Path, tmp_path: Path) -> None:
    working = tmp_path / "out.partial"
    working.mkdir()
    (working / "journal.json").write_text('{"fingerprint": "another", "blocks": []}')
    command = ("compress", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, "--no-evaluate", "--quiet")
    with (working / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = invoke(*command)
    assert (ran.code, "another planish is at work there" in ran.err) == (2, True)
    ran = invoke(*command)
    assert (ran.code, "another recipe" in ran.err) == (2, True)
    (working / "journal.json").unlink()  # killed as it began
    assert invoke(*command).code == 0


def test_a_run_that_was_quicker_keeps_its_folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, *args: object, **named: object) -> None:
        make(path, *args, **named)  # type: ignore[arg-type]
        if path.name == "out.partial":
            file = (path / "lock").open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            held.append(file)

    make, held = Path.mkdir, []
    monkeypatch.setattr(Path, "mkdir", mkdir)
    ran = invoke("compress", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, "--no-evaluate", "--quiet")
    held[0].close()
    assert (ran.code, "another planish is at work there" in ran.err) == (2, True)
    assert (tmp_path / "out.partial" / "lock").exists()


@pytest.fixture
def unevaluated(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str | Path, ...]:
    """A command that was interrupted while it evaluated."""

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    command = ("compress", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, "--gate", "kl=9", "--json")
    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.job.evaluate", stop)
        ran = invoke(*command)
    assert (ran.code, ran.out) == (130, "")
    assert "complete, and the same command goes on with the evaluation" in ran.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report.json.partial"]
    return command


def test_interrupted_while_evaluating(unevaluated: tuple[str | Path, ...], tmp_path: Path) -> None:
    before = tree(tmp_path / "out")
    ran = invoke(*unevaluated, "--markdown", tmp_path / "out.md")
    assert (ran.code, "going on: the checkpoint is complete" in ran.err) == (0, True)
    assert "blocks 1/" not in ran.err
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.md", "out.report.html", "out.report.json"]
    report = json.loads(ran.out)
    assert report == json.loads((tmp_path / "out.report.json").read_text())
    assert (report["gate"]["met"], len(report["blocks"])) == (True, 3)
    whole = json.loads(invoke(*unevaluated[:5], tmp_path / "whole", *unevaluated[6:]).out)
    for key in ("bytes", "bits_per_weight", "blocks", "recipe_sha256", "model_sha256", "gate"):
        assert report[key] == whole[key]
    assert {**report["evaluation"], "seconds": 0} == {**whole["evaluation"], "seconds": 0}
    refused = invoke(*unevaluated)
    assert (refused.code, "overwrites nothing" in refused.err) == (2, True)


def test_an_evaluation_can_be_left_out_after_all(unevaluated: tuple[str | Path, ...], tmp_path: Path) -> None:
    assert invoke(*(part for part in unevaluated if part not in ("--gate", "kl=9")), "--no-evaluate").code == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["evaluation"] is None
    assert not (tmp_path / "out.report.json.partial").exists()


def test_another_command_does_not_evaluate(unevaluated: tuple[str | Path, ...], tmp_path: Path) -> None:
    before, native = tree(tmp_path), working_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    for other in (("--set", "calibration.seed=5"), ("--dtype", "float32" if native else "bfloat16")):
        ran = invoke(*unevaluated, *other, "--quiet")
        assert (ran.code, "exists, and planish overwrites nothing" in ran.err) == (2, True)
        assert "the command that made it, unchanged" in ran.err
    with (tmp_path / "out.report.json.partial").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = invoke(*unevaluated, "--quiet")
    assert (ran.code, "another planish is evaluating it" in ran.err) == (2, True)
    assert tree(tmp_path) == before


def test_interrupted_as_the_working_folder_goes(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, out: Path) -> None:
        folder.rename(out)
        raise KeyboardInterrupt

    command = ("compress", "w8a8", "--model", original, "--out", tmp_path / "out", *SHORT, "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr("planish.compressing.compression.publish", interrupted)
        ran = invoke(*command)
    assert ran.err.splitlines()[-1] == f"Stopped. The checkpoint {tmp_path / 'out'} is complete, and the same command writes its report."
    assert invoke(*command).code == 0
    assert (tmp_path / "out.report.json").is_file()
