"""The user's cache folder: what planish converts once (GGUF files, pickle weights, the demo model), keyed by the content of what was converted."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ...quant.cache_folder import cache_folder as cache_folder
from ...quant.errors import PlanishError


def content_hash(files: Iterable[Path]) -> str:
    """The first 16 hex digits of the SHA-256 of the files' contents, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def kept(name: str) -> Path:
    """Where `build_once` keeps what has this name, there or not."""
    return cache_folder() / "models" / name


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, made by `build(folder)` where it is not there yet.

    `build` fills a folder with a temporary name, which gets its own name once everything in it is on disk: the folder is whole or absent.
    """
    final = kept(name)
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}-", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise PlanishError(f"{final.parent}: cannot be written ({error.strerror}). Set PLANISH_CACHE to a folder that can.") from error
    try:
        build(partial)
        _settle(partial)
        with contextlib.suppress(FileExistsError):
            _rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _settle(folder: Path) -> None:
    """Flush all files to disk, and give them ordinary permissions (temporary folders and safetensors files are made for their owner alone)."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _rename(partial: Path, final: Path) -> None:
    """Rename; FileExistsError where another process was faster."""
    try:
        partial.rename(final)
    except OSError as error:
        if not final.is_dir():
            raise
        raise FileExistsError(final) from error
