"""Writing a sharded safetensors checkpoint from tensors that lie in other files, byte for byte and in constant memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..calib.files.shards import DTYPES, INDEX_FILE, SINGLE_FILE, TensorInfo
from ..common.files import write_text

COPY_BYTES = 16 << 20
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_shards(folder: Path, tensors: Mapping[str, TensorInfo], shard_bytes: int) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and an index when all together exceed shard_bytes.

    tensors: by the name they get, in the order in which they are dealt to shards.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if size and size + info.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE_FILE, shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        where.update(dict.fromkeys(shard, file))
    total = sum(info.nbytes for info in tensors.values())
    write_text(folder / INDEX_FILE, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n")


def _write_shard(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """One file; wide types first, so that every tensor is aligned to its item size."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in order:
        header[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, begin + info.nbytes]}
        begin += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, info in order:
            with info.file.open("rb") as source:
                source.seek(info.offset)
                left = info.nbytes
                while left:
                    piece = source.read(min(left, COPY_BYTES))
                    if not piece:
                        raise OSError(f"{info.file} ended inside tensor {info.name}")
                    out.write(piece)
                    left -= len(piece)
        out.flush()
        os.fsync(out.fileno())
