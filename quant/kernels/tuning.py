"""Tile sizes: what was measured for a shape on a device, else a rule of thumb. Nothing is tried out at the first call.

configs/tuned.json: {"device|op|N|K|bucket": [block_m, block_n, block_k, warps, stages]}; bucket: M rounded up to one of BUCKETS.
benchmarks/kernels.py
--tune writes such entries.
"""

import json
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

BUCKETS = (16, 32, 64, 128, 512, 2048, 1 << 30)
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
    return tuned().get(key(device, op, tokens, columns, inputs)) or rule(op, tokens)


def rule(op: str, tokens: int) -> Config:
    """The rule of thumb. Few tokens: narrow tiles, long steps, so that many loads are in flight; many: tiles that fill the tensor cores."""
    packed = op != "linear_w8a8"
    if tokens <= 16:
        return Config(16, 64 if packed else 32, 128, 4, 4)
    if tokens <= 64:
        return Config(64 if tokens > 32 else 32, 64, 128, 4, 4)
    if op == "linear_w4a16":
        return Config(64, 128, 64, 8, 3)
    return Config(128, 128, 64 if packed else 128, 8, 3)


def candidates(op: str, tokens: int) -> list[Config]:
    """What a tuning run tries."""
    rows = [16] if tokens <= 16 else [32, 64] if tokens <= 64 else [64, 128, 256]
    columns = [32, 64, 128] if tokens <= 64 else [128, 256] if op != "linear_w4a16" else [64, 128]
    return [Config(m, n, k, w, s) for m in rows for n in columns for k in (64, 128, 256) for w in (4, 8) for s in (3, 4) if m * n <= 128 * 256]
