"""Weights in safetensors files: strict headers, and reads that leave nothing of the file in resident memory.

The files are read with plain reads, not mapped: the pages of a mapping count as resident memory of the process, so a walk over a mapped checkpoint
ends up holding all of it. Format: 8 bytes header length (little endian), a JSON header, the data (https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ...quant.errors import PlanishError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CHUNK_BYTES = 1 << 20  # fits a core's cache: what was read is looked at before it leaves
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `name` is its name in `file`, `offset` its first byte there."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file. Errors: the file is missing, not readable, not JSON, or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PlanishError(f"{path}: no such file. A model folder holds {path.name}.") from None
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise PlanishError(f"{path}: not JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise PlanishError(f"{path}: holds a JSON {type(value).__name__}, not an object. Download the file again.")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by their names in it.

    Errors: no such file; a header that is too long, not JSON, or that does not describe the file's bytes without gap and overlap (a truncated file).
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(0)
            entries, start = _parse_header(file, size)
    except PlanishError as error:
        raise PlanishError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise PlanishError(f"{path}: no such file, but the checkpoint needs it. Download the missing file.") from None
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read ({error.strerror}).") from error
    tensors, end = {}, 0
    for begin, stop, name, entry in sorted(_spans(path, entries), key=lambda span: span[:2]):
        tensors[name] = info = _info(path, name, entry, start + begin)
        if begin != end or stop - begin != info.nbytes:
            raise PlanishError(f"{path}: wrong header: tensor {name} cannot fill bytes {begin} to {stop} by its shape and neighbours.")
        end = stop
    if start + end != size:
        what = "truncated" if start + end > size else "longer than its header says"
        raise PlanishError(f"{path}: {what}: {size} bytes, where the header describes {start + end}. Download the file again.")
    return tensors


def _parse_header(file: FileIO, size: int) -> tuple[dict[str, object], int]:
    """The header's entries and the offset of the first data byte."""
    prefix = file.read(8)
    if prefix == b"version ":
        raise PlanishError("a Git LFS pointer, not the weights. Run `git lfs pull` in the folder.")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, LONGEST_HEADER):
        raise PlanishError(f"wrong header: {size} bytes cannot hold a header of {length}. Truncated, or not a safetensors file.")
    try:
        entries = json.loads(file.read(length))
    except ValueError as error:
        raise PlanishError(f"wrong header: not JSON ({error}). Download the file again.") from error
    if not isinstance(entries, dict):
        raise PlanishError("wrong header: not a JSON object. Download the file again.")
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _spans(path: Path, entries: Mapping[str, object]) -> Iterator[tuple[int, int, str, dict[str, object]]]:
    """First byte, end, name and entry of each tensor, counted from the first data byte."""
    for name, entry in entries.items():
        match entry:
            case {"data_offsets": [int(begin), int(end)]} if isinstance(entry, dict) and 0 <= begin <= end:
                yield begin, end, name, entry
            case _:
                raise PlanishError(f"{path}: wrong header: tensor {name} has no valid data_offsets: {entry!r}.")


def _info(path: Path, name: str, entry: Mapping[str, object], offset: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)} if all(isinstance(n, int) and n >= 0 for n in shape):
            if dtype not in DTYPES:
                raise PlanishError(f"{path}: tensor {name} has dtype {dtype}; planish compresses bfloat16, float16 and float32 weights.")
            return TensorInfo(file=path, name=name, dtype=DTYPES[dtype], shape=tuple(shape), offset=offset)
        case _:
            raise PlanishError(f"{path}: wrong header: tensor {name} has no valid dtype and shape: {entry!r}.")


def read_shards(files: Mapping[Path, list[str]]) -> dict[str, TensorInfo]:
    """All tensors of the files. `files` maps each to the tensors that the index promises there (none for a file without index).

    Errors: a file is missing (all missing ones are named), its header is wrong, or it lacks a promised tensor.
    """
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        folder = next(iter(files)).parent
        raise PlanishError(f"{folder}: {len(missing)} of {len(files)} weight files missing: {', '.join(missing)}. Download them.")
    stored: dict[str, TensorInfo] = {}
    promised: dict[str, TensorInfo] = {}
    for file, names in files.items():
        tensors = read_header(file)
        stored |= tensors
        for name in names:
            if name not in tensors:
                raise PlanishError(f"{file}: has no tensor {name}, which {INDEX_FILE} lists there. Download the index and the file again.")
            promised[name] = tensors[name]
    return stored | promised


def read_index(path: Path) -> dict[Path, list[str]]:
    """The weight files of an index and the tensors it lists in each. Errors: no weight_map, or file names that leave the folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlanishError(f"{path}: has no weight_map (tensor names to file names). Download the file again.")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise PlanishError(f"{path}: tensor {name} lies in {file!r}, which is no file name. Download the file again.")
        files.setdefault(path.parent / file, []).append(name)
    return files


def read_tensor(info: TensorInfo) -> Tensor:
    """A copy of the tensor in its stored dtype."""
    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        _fill(flat, file, info)
    return flat.view(info.dtype).view(info.shape)


def read_chunks(info: TensorInfo, buffer: Tensor) -> Iterator[Tensor]:
    """The tensor's elements in order, as flat pieces that live in `buffer` (uint8, its length a multiple of 8) until the next one is asked for."""
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        for start in range(0, info.nbytes, buffer.numel()):
            piece = buffer[: min(buffer.numel(), info.nbytes - start)]
            _fill(piece, file, info)
            yield piece.view(info.dtype)


def _fill(flat: Tensor, file: FileIO, info: TensorInfo) -> None:
    """Read until `flat` (uint8) is full: one system call gives at most 2 GB."""
    view, done = flat.numpy().data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise PlanishError(f"{info.file}: ended inside tensor {info.name}. The file changed while it was read.")
        done += count
