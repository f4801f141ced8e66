"""Tile sizes: what was measured for a shape on a device, else a rule of thumb. Nothing is tried out at the first call.

configs/tuned.json: {"device|op|N|K|bucket": [block_m, block_n, block_k, warps, stages]}; bucket: M rounded up to one of BUCKETS.
benchmarks/kernels.py
--tune writes such entries.
"""

import json
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

BUCKETS = (16, 32, 64, 128, 512, 2048, 1 << 30)
_PROGRAMS = 2 * 132  # two for every multiprocessor of an H200
_LARGEST = 220 << 10  # bytes of operands in flight, one byte a code
_FILE = Path(__file__).parent / "configs" / "tuned.json"


@dataclass(frozen=True, slots=True)
class Config:
    """One launch: the tile of the result (block_m tokens, block_n channels), bytes of the weight a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def bucket(tokens: int) -> int:
    """The smallest of BUCKETS that holds so many tokens."""
    return next(size for size in BUCKETS if tokens <= size)


def key(device: str, op: str, tokens: int, columns: int, inputs: int) -> str:
    """Under which a configuration is stored."""
    return f"{device}|{op}|{columns}|{inputs}|{bucket(tokens)}"


@lru_cache(maxsize=1)
def tuned(file: Path = _FILE) -> dict[str, Config]:
    """What is stored."""
    return {name: Config(*values) for name, values in json.loads(file.read_text()).items()}


def stored(configs: dict[str, Config]) -> str:
    """The text of such a file."""
    return json.dumps({name: astuple(config) for name, config in sorted(configs.items())}, indent=0) + "\n"


@lru_cache(maxsize=4096)
def choose(device: str, op: str, tokens: int, columns: int, inputs: int) -> Config:
    """The configuration to launch with. device: its name as torch.cuda gives it."""
    return tuned().get(key(device, op, tokens, columns, inputs)) or rule(op, tokens, columns)


def rule(op: str, tokens: int, columns: int) -> Config:
    """The rule of thumb. Few tokens: tiles so narrow that every multiprocessor has some, with steps so long that the same bytes of the weight are in
    flight. Many: tiles that fill the tensor cores."""
    packed = op != "linear_w8a8"
    if tokens <= 16:
        widest, narrowest = (64 if packed else 32), (32 if op == "linear_w4a16" else 16)
        block_n = next((size for size in (64, 32) if narrowest < size <= widest and columns >= size * _PROGRAMS), narrowest)
        longest = {"linear_w4a16": 128, "linear_w4a4": 256}.get(op, 512)  # by groups, and by registers
        return Config(16, block_n, min(longest, 128 * widest // block_n), 4, 4)
    if tokens <= 64:
        return Config(64 if tokens > 32 else 32, 64, 64 if op == "linear_w4a16" else 128, 4, 4)
    if op == "linear_w4a16":
        return Config(64, 128, 64, 8, 3)
    return Config(128, 128, 64 if packed else 128, 8, 3)


def neighbours(config: Config, tokens: int) -> list[Config]:
    """Configurations that differ in one value, for a tuning run to try."""
    rows = [size for size in (16, 32, 64, 128, 256) if size < 2 * max(16, tokens)]
    values = {"block_m": rows, "block_n": (16, 32, 64, 128, 256), "block_k": (64, 128, 256, 512), "warps": (2, 4, 8), "stages": (2, 3, 4, 6)}
    found = [replace(config, **{name: value}) for name, some in values.items() for value in some if value != getattr(config, name)]
    return [c for c in found if c.block_m * c.block_n <= 128 * 256 and (c.block_m + c.block_n) * c.block_k * c.stages <= _LARGEST]
