"""Where a checkpoint comes from: files that are not as they were written, manifests that cannot be read, another model than was compressed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_stored import rounded, saved
from tiny_models import tiny

from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.shards import INDEX_FILE
from planish.eval.verifying.origin import MANIFEST_FILE, check_files, check_made_from, file_digests, origin_note
from planish.eval.verifying.verify import verify
from planish.quant.errors import PlanishError
from planish.quant.formats import Scheme, WeightFormat

WEIGHTS = "model.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A checkpoint with a manifest."""
    folder = rounded(saved(tiny("llama"), tmp_path / "model"), tmp_path / "out", Scheme(weights=WeightFormat(bits=8)))
    (folder / MANIFEST_FILE).parent.mkdir()
    model = {"sha256": open_checkpoint(tmp_path / "model").fingerprint()}
    (folder / MANIFEST_FILE).write_text(json.dumps({"recipe": {}, "model": model, "files": file_digests(folder)}))
    return folder


def flip(file: Path) -> None:
    """The lowest bit of a byte amid the file: a code or scale that is still a valid one."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_files_as_they_were_written(out: Path) -> None:
    check = check_files(out)
    assert (check.ok, check.message) == (True, "2 files as they were written, by SHA-256")


def test_one_bit_of_the_weights(out: Path) -> None:
    flip(out / WEIGHTS)
    found = verify(out, stock=False)
    assert [check.name for check in found.checks if check.ok is False] == ["files"]
    assert found["files"].message.startswith(f"{WEIGHTS} is not as it was written")
    assert "Copy the checkpoint again" in found["files"].message


def test_digests_are_of_whole_files(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many reads they take, and of the index too."""
    monkeypatch.setattr("planish.eval.verifying.origin.READ_BYTES", 100)
    (out / INDEX_FILE).write_text("{}")
    names = {"config.json", WEIGHTS, INDEX_FILE}
    assert file_digests(out) == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    assert "is not in planish/manifest.json" in check_files(out).message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "config.json").write_text((out / "config.json").read_text() + "\n"), "config.json is not as it was written"),
        (lambda out: (out / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda out: (out / "more.safetensors").write_bytes(b""), "more.safetensors is not in planish/manifest.json"),
    ],
    ids=["config", "missing", "more"],
)
def test_other_files(change: Callable[[Path], object], message: str, out: Path) -> None:
    change(out)
    check = check_files(out)
    assert check.ok is False
    assert message in check.message


NO_MANIFESTS = (
    "{",
    "[]",
    "{}",
    '{"recipe": {}}',
    '{"model": {}}',
    '{"recipe": {}, "model": {}, "files": []}',
    '{"recipe": {}, "model": {}, "files": {"../x": "0"}}',
    '{"recipe": {}, "model": {}, "files": {"config.json": 0}}',
)


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_cannot_be_read(content: str, out: Path, tmp_path: Path) -> None:
    (out / MANIFEST_FILE).write_text(content)
    found = verify(out, stock=False)
    assert not found.ok
    assert str(out / MANIFEST_FILE) in found["files"].message
    assert "not known" in (origin_note(open_checkpoint(tmp_path / "model"), open_stored(out)) or "")


def test_no_manifest_or_one_without_digests(out: Path) -> None:
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    (out / MANIFEST_FILE).write_text(json.dumps({key: value for key, value in manifest.items() if key != "files"}))
    flip(out / WEIGHTS)
    check = check_files(out)
    assert (check.ok, "not checked: planish/manifest.json has no digests" in check.message) == (None, True)
    (out / MANIFEST_FILE).unlink()
    check = check_files(out)
    assert (check.ok, check.message) == (None, "not checked: no planish/manifest.json: not written by planish")


def test_the_model_that_was_compressed(out: Path, tmp_path: Path) -> None:
    stored = open_stored(out)
    base, other = open_checkpoint(tmp_path / "model"), open_checkpoint(saved(tiny("llama", seed=5), tmp_path / "other"))
    check_made_from(base, stored)
    assert origin_note(base, stored) is None
    check_made_from(other, stored)
    assert "other is not the very model that" in (origin_note(other, stored) or "")
    (out / MANIFEST_FILE).unlink()
    assert origin_note(other, stored) is None


@pytest.mark.parametrize(("family", "changes"), [("llama", {"num_hidden_layers": 2}), ("llama", {"hidden_size": 96}), ("mistral", {})])
def test_a_model_of_another_build(family: str, changes: dict[str, int], out: Path, tmp_path: Path) -> None:
    other = open_checkpoint(saved(tiny(family, changes={"num_hidden_layers": 3, **changes}), tmp_path / "other"))
    assert open_stored(out).config.num_hidden_layers == 3
    with pytest.raises(PlanishError, match="one was not made from the other"):
        check_made_from(other, open_stored(out))
    with pytest.raises(PlanishError, match="one was not made from the other"):
        verify(out, tmp_path / "other", stock=False)
