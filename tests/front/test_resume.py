"""A run that is killed or interrupted goes on where it was, and ends in the same bytes as one that is not."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers_compress import outlying, quick
from helpers_front import invoke, start, tree, wait_for
from helpers_text import build_tokenizer
from tiny_models import tiny

import planish

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
        ("fused.learned", "fold_norms, rotate: {at: residual, kind: learned, steps: 2}, rotate: {at: value, kind: learned, steps: 2}"),
        ("fused._ranges", "fold_norms, rotate: {at: residual, seeds: 3}"),
        ("compression.search_prefix", "prefix: {tokens: auto}"),
        ("beside.search", "super_weight: {places: auto, z: 12}"),
        ("compression.decide", "hadamard, raise_activations: {bits: 8, share: 0.25}"),
    ],
)
def test_what_was_found_before_the_walk_is_not_searched_again(finder: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays what the finished blocks were made with, whatever a second search would find."""
    model, recipe = outlying(tmp_path / "model"), quick("w4a4-fast", f"steps=[{steps}]")

    def stop(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    planish.compress(recipe, model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("planish.compression.write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(recipe, model, tmp_path / "out")
    monkeypatch.setattr(f"planish.{finder}", stop)
    planish.compress(recipe, model, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        planish.compress(recipe, model, tmp_path / "other")


def test_another_recipe_does_not_go_on(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("planish.compression.write_checkpoint", stop)
        ran = invoke("compress", "w8a8-static", "--model", deep, "--out", tmp_path / "out", *SETTINGS, "--quiet")
    assert ran.code == 130
    assert ran.err.startswith(f"Stopped. {BLOCKS} of {BLOCKS} blocks")
    before = tree(tmp_path)
    ran = invoke("compress", "w8a8", "--model", deep, "--out", tmp_path / "out", *SETTINGS, "--quiet")
    assert ran.code == 2
    assert "another recipe" in ran.err
    assert tree(tmp_path) == before
