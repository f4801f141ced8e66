"""What the base model said, kept in the user's cache folder, so that evaluating the next compressed checkpoint costs half.

Everything that decides a number is in a file's name, as one digest: the model's files, the requests, versions of the libraries, arithmetic, device
and batch size. Files appear whole, and can be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...calib.files.cache import cache_folder
from ...calib.files.checkpoint import Checkpoint
from ...calib.files.locate import side_files
from ...quant.errors import PlanishError

HIDDEN = "hidden"  # the tensor in a file of hidden states


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """A model on a task: each metric's value, whether more of it is better, and for metrics that are means the value of each sample in the documents'
    order."""

    values: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]]
    higher_is_better: Mapping[str, bool]


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over the names and contents of the model's configuration, weights, tokenizer and other side files. Reads all of them."""
    weights = {info.file for info in checkpoint.tensors.values()}
    files = {checkpoint.path / "config.json", *weights, *(checkpoint.path / path for path in side_files(checkpoint.path))}
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def key_of(**facts: object) -> str:
    """A digest of what decides a number."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _folder() -> Path:
    return cache_folder() / "evaluations"


def kept_answers(key: str) -> Answers | None:
    """What is kept under the key. None: nothing that can be read."""
    try:
        data = json.loads((_folder() / f"{key}.json").read_text(encoding="utf-8"))
        samples = {name: tuple(map(float, values)) for name, values in data["samples"].items()}
        return Answers(values=data["values"], samples=samples, higher_is_better=data["higher_is_better"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_answers(key: str, answers: Answers) -> None:
    """Write under the key."""
    text = json.dumps(asdict(answers))
    _write(f"{key}.json", lambda path: path.write_text(text, encoding="utf-8"))


def kept_hidden(key: str) -> Tensor | None:
    """Hidden states that are kept under the key. None: nothing that can be read."""
    try:
        return load_file(_folder() / f"{key}.safetensors")[HIDDEN]
    except (OSError, SafetensorError, KeyError):
        return None


def keep_hidden(key: str, hidden: Tensor) -> None:
    """Write under the key."""
    _write(f"{key}.safetensors", lambda path: save_file({HIDDEN: hidden.contiguous()}, path))


def check_keepable() -> None:
    """PlanishError if nothing can be kept."""
    _partial("check").unlink()


def _partial(name: str) -> Path:
    """A new empty file in the folder."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f"{name}-", suffix=".partial", dir=folder)
    except OSError as error:
        raise PlanishError(f"{folder}: cannot be written ({error.strerror}). Set PLANISH_CACHE to a folder that can.") from error
    os.close(handle)
    return Path(partial)


def _write(name: str, fill: Callable[[Path], object]) -> None:
    """A file that appears whole: another name, to the disk, renamed."""
    path = _partial(name)
    try:
        fill(path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.chmod(0o644)
        path.replace(path.with_name(name))
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
