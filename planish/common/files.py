"""Files that appear whole or not at all, folders that one process works in, and what is found once and kept."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..quant.errors import PlanishError


class BusyError(PlanishError):
    """Another process works in the folder."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename. What fails leaves nothing, and names the file."""
    new = path.with_name(path.name + ".new")
    with _named(path, new):
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@contextmanager
def _named(path: Path, new: Path) -> Iterator[None]:
    """While `path` is written as `new`: if that fails, `new` is removed, and the error says `path`, which errors of writing do not of themselves."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
            raise
        if "os error 28" in str(error):  # that library has one class for everything
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in this folder while the `with` lasts; BusyError if somebody does."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{folder}: another planish is at work there. Wait for it, or choose another output folder.") from None
        yield


T = TypeVar("T")
Kept = tuple[Any, Mapping[str, Tensor]]  # plain values, and tensors


def once(folder: Path | None, name: str, find: Callable[[], T], keep: Callable[[T], Kept], again: Callable[[Any, Mapping[str, Tensor]], T]) -> T:
    """What `find` finds before the walk, found once: kept in the folder, from where a run that goes on has it `again`.

    For the finished blocks were made with it, it can take minutes, and a second search may end elsewhere: a GPU's sums have no fixed order.
    folder None: nothing is kept.
    """
    file = None if folder is None else folder / f"found-{name}.safetensors"
    if file is not None and file.is_file():
        with safe_open(file, "pt") as opened:
            return again(json.loads(opened.metadata()["found"]), {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    found = find()
    if file is not None:
        values, tensors = keep(found)
        save_tensors({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"found": json.dumps(values)})
    return found


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, as write_text does."""
    new = file.with_suffix(".new")
    with _named(file, new):
        save_file(dict(tensors), new, metadata)
        sync(new)
        new.replace(file)
