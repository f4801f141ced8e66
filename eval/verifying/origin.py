"""What a checkpoint says of where it comes from, held against what is there: digests of its files, and the model that it was made from."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...calib.compressed.stored import StoredCheckpoint
from ...calib.files.checkpoint import Checkpoint
from ...calib.files.shards import INDEX_FILE, read_json
from ...quant.errors import PlanishError
from ..scores.check import Check, listed, not_done

MANIFEST_FILE = Path("planish/manifest.json")
READ_BYTES = 4 << 20


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of config.json, of every weight file, and of their index if there is one, by the file's name."""
    return {name: _sha256(folder / name) for name in sorted({"config.json", *_weight_names(folder)})}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """planish's record of how a checkpoint was made; None if it has none. Errors: it cannot be read, or is no such record."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    manifest = dict(read_json(path))
    files = manifest.get("files", {})
    if not all(isinstance(manifest.get(key), dict) for key in ("recipe", "model")) or not isinstance(files, dict):
        raise PlanishError(f"{path}: no manifest of planish: it does not say what the checkpoint was made of. Copy the checkpoint again.")
    if any(Path(name).name != name or not isinstance(digest, str) for name, digest in files.items()):
        raise PlanishError(f"{path}: files are no names with digests. Copy the checkpoint again.")
    return manifest


def check_files(folder: Path) -> Check:
    """The manifest can be read, and the files that it has digests of are those that were written."""
    try:
        manifest = read_manifest(folder)
    except PlanishError as error:
        return Check("files", False, str(error), {})
    if manifest is None:
        return not_done("files", f"no {MANIFEST_FILE}: not written by planish")
    if "files" not in manifest:
        return not_done("files", f"{MANIFEST_FILE} has no digests: written by an earlier version of planish")
    faults = list(_file_faults(folder, manifest["files"]))
    if faults:
        return Check("files", False, f"{listed(faults)}. Copy the checkpoint again, or compress again.", {"files": len(manifest["files"])})
    return Check("files", True, f"{len(manifest['files'])} files as they were written, by SHA-256", {"files": len(manifest["files"])})


def _file_faults(folder: Path, digests: Mapping[str, str]) -> Iterator[str]:
    for name, digest in digests.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif _sha256(folder / name) != digest:
            yield f"{name} is not as it was written: its SHA-256 is another than in {MANIFEST_FILE}"
    yield from (f"{name} is not in {MANIFEST_FILE}" for name in _weight_names(folder) if name not in digests)


def _weight_names(folder: Path) -> list[str]:
    index = [INDEX_FILE] if (folder / INDEX_FILE).is_file() else []
    return sorted([*(file.name for file in folder.glob("*.safetensors")), *index])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def check_made_from(base: Checkpoint, stored: StoredCheckpoint) -> None:
    """PlanishError if the checkpoint cannot have been made from the base model: another family, another number of blocks, or another width."""
    if _build(base) != _build(stored):
        raise PlanishError(
            f"{base.path} is {_described(base)}, {stored.path} {_described(stored)}: one was not made from the other. "
            "Give the model that was compressed."
        )


def _build(checkpoint: Checkpoint) -> tuple[str, int | None, int | None]:
    """Family, blocks, width of the residual stream."""
    text = checkpoint.config.get_text_config()
    return checkpoint.config.model_type, getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)


def _described(checkpoint: Checkpoint) -> str:
    family, blocks, width = _build(checkpoint)
    return f"a {family} model of {blocks} blocks and width {width}"


def origin_note(base: Checkpoint, stored: StoredCheckpoint) -> str | None:
    """What a reader of a comparison should know of the base: that it is not the model that the manifest names, or that this cannot be told.
    None where it is, and where no manifest says."""
    try:
        manifest = read_manifest(stored.path)
    except PlanishError as error:
        return f"whether {base.path} is the model that was compressed is not known: {error}"
    known = None if manifest is None else manifest["model"].get("sha256")
    if known is None or known == base.fingerprint():
        return None
    return (
        f"{base.path} is not the very model that {stored.path} was made from: its fingerprint is another than in {MANIFEST_FILE}, "
        "so differences are not of the compression alone."
    )
