"""The Triton kernels compiled ahead of time for every architecture, without a GPU: they compile, spill nothing, and use the tensor cores' instruction
that they are meant to. Run by test_triton.py in a process of its own.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from planish.quant.kernels.cuda import blocks_tile, largest_tile, quantize_warps, weight_only_steps
from planish.quant.kernels.triton_blocks import blocks_kernel
from planish.quant.kernels.triton_columns import columns_kernel
from planish.quant.kernels.triton_hadamard import hadamard_kernel
from planish.quant.kernels.triton_linear import integer_kernel, weight_only_kernel
from planish.quant.kernels.triton_quantize import quantize_kernel
from planish.quant.kernels.tuning import rule
from planish.quant.solvers.columns import LAUNCHED

ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program can have
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Built:
    """What was compiled: registers a thread, bytes of local memory, KiB of shared memory, SASS."""

    registers: int
    local: int
    shared: float
    sass: str


def build(kernel: object, pointers: dict[str, str], constants: dict[str, object], architecture: int, tmp: Path, warps: int, stages: int = 3) -> Built:
    """Pointers by name with their types; all other arguments that are no constants are int32, or float32 where the name says so."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    floats = {"eps", "clip", "factor"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "fp32" if n in floats else "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n.endswith("stride") or n in ("rows", "columns", "width")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages})
    cubin = tmp / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([BINARIES / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers = re.search(r"REG:(\d+)", usage)
    assert local is not None
    assert registers is not None
    return Built(int(registers[1]), int(local[1]) + int(local[2]), made.metadata.shared / 1024, sass)


def opcodes(sass: str) -> set[str]:
    return {found.split(".")[0] for found in re.findall(r"\b(?:[A-Z]*MMA)[A-Z0-9.]*", sass)}


def spilled_in_loops(sass: str) -> list[str]:
    """Accesses to local memory between the target of a branch backwards and the branch. What waits lies behind the last EXIT, and jumps back, too."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)]
    last = max(at for at, text in code if re.search(r"\bEXIT\b", text))
    jumps = [(int(found[1], 16), at) for at, text in code if at < last and (found := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    return [text for at, text in code if re.search(r"\b(?:LDL|STL)\b", text) and any(start <= at < end for start, end in jumps)]


def check(built: Built, architecture: int, local: int = 0) -> None:
    """local: bytes a thread may hold in local memory outside its loops."""
    assert built.local <= local
    assert not spilled_in_loops(built.sass)
    assert built.shared <= SHARED[architecture]


INTEGER = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "w_sum_ptr": "*i32"}
INTEGER |= {"bias_ptr": "*bf16", "low_ptr": "*bf16", "up_ptr": "*bf16", "y_ptr": "*bf16"}
EXPECTED = {80: {"IMMA"}, 89: {"IMMA"}, 90: {"IGMMA"}, 100: {"IMMA"}, 120: {"IMMA"}}
FLOAT = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"HMMA", "UTCHMMA"}, 120: {"HMMA"}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w4a8", "linear_w4a4"])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 4096), (1, 28672), (4096, 4096)])
def test_integer_linear(name: str, tokens: int, columns: int, architecture: int, tmp_path: Path) -> None:
    config, packed = rule(name, tokens, columns), name != "linear_w8a8"
    constants: dict[str, object] = {"X_PACKED": name == "linear_w4a4", "W_PACKED": packed, "ZERO": True, "BIAS": True, "SIDE": False}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": 16, "GROUP": 8}
    constants |= {"steps": 2048 if packed else 4096, "rank": 0}
    built = build(integer_kernel, INTEGER, constants, architecture, tmp_path, config.warps, config.stages)
    print(name, tokens, architecture, built.registers, built.local, round(built.shared), opcodes(built.sass))
    check(built, architecture)
    if tokens > 64:
        assert opcodes(built.sass) & EXPECTED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 4096), (1, 28672), (24, 4096), (64, 4096), (4096, 4096)])
@pytest.mark.parametrize(("steps", "size", "zero"), [(2048, 128, False), (2048, 64, True), (448, 896, True), (288, 36, True)])
def test_w4a16(steps: int, size: int, zero: bool, tokens: int, columns: int, architecture: int, tmp_path: Path) -> None:
    """Of Llama 3 8B, in groups of 64 of it, per channel in rows that no tile divides, in groups that no step fits."""
    config = rule("linear_w4a16", tokens, columns)
    block_k, stages, uniform = weight_only_steps(config, steps, size)
    constants: dict[str, object] = {"SIZE": size, "ZERO": zero, "BIAS": False, "UNIFORM": uniform, "steps": steps, "GROUP": 8}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": block_k}
    pointers = {"x_ptr": "*bf16", "w_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    built = build(weight_only_kernel, pointers, constants, architecture, tmp_path, config.warps, stages)
    print("w4a16", tokens, columns, steps, size, block_k, architecture, built.registers, built.local, round(built.shared), opcodes(built.sass))
    check(built, architecture, local=16)  # what is used before and after the loop only
    if tokens > 64:
        assert opcodes(built.sass) & FLOAT[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("producer", [0, 1, 2])
@pytest.mark.parametrize("width", [4096, 14336, 28672])
def test_quantize(producer: int, width: int, architecture: int, tmp_path: Path) -> None:
    block = triton.next_power_of_2(width // 2)
    pointers = {"x_ptr": "*bf16", "other_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32"}
    constants: dict[str, object] = {"PRODUCER": producer, "BITS": 4, "SYMMETRIC": False, "PACKED": True, "BLOCK": block}
    built = build(quantize_kernel, pointers, constants, architecture, tmp_path, quantize_warps(block))
    print("quantize", width, producer, architecture, built.registers, built.local, len(re.findall("LDL|STL", built.sass)))
    check(built, architecture, local=0 if width < 28672 else 96)  # of the widest tokens some values do not fit in registers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("a", "b"), [(64, 64), (112, 128), (24, 24), (144, 96), (128, 224)])
def test_hadamard(a: int, b: int, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {name: max(16, triton.next_power_of_2(n)) for name, n in {"BLOCK_A": a, "BLOCK_H": a // 2, "BLOCK_B": b}.items()}
    tile = blocks["BLOCK_A"] * blocks["BLOCK_B"]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (architecture // 10, architecture % 10))
    if tile > largest_tile(torch.device("cuda", architecture)):
        return  # rotated by torch there
    pointers = dict.fromkeys(("x_ptr", "signs_ptr", "left_ptr", "right_ptr"), "*bf16") | {
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "zero_ptr": "*i32",
    }
    constants: dict[str, object] = {"A": a, "B": b, **blocks, "BLOCK_K": min(blocks["BLOCK_B"], 32), "SIGNS": False, "BITS": 4}
    constants |= {"SYMMETRIC": False, "PACKED": True}
    warps = 8 if tile > 2048 else 4
    built = build(hadamard_kernel, pointers, constants, architecture, tmp_path, warps)
    print("hadamard", a, b, architecture, built.registers, built.local, round(built.shared), opcodes(built.sass))
    check(built, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("width", "size"), [(4096, 128), (14336, 112), (4032, 192), (2304, 576)])
def test_blocks(width: int, size: int, architecture: int, tmp_path: Path) -> None:
    unit, block_m, block_n, block_k = blocks_tile(width, size)
    pointers = {"x_ptr": "*bf16", "matrix_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32"}
    constants: dict[str, object] = {"C": width, "B": size, "UNIT": unit, "SHARED": False, "BITS": 4, "SYMMETRIC": False, "PACKED": True}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    built = build(blocks_kernel, pointers, constants, architecture, tmp_path, 8, 2)
    print("blocks", width, size, architecture, built.registers, built.local, round(built.shared), opcodes(built.sass))
    check(built, architecture)
    assert opcodes(built.sass) & FLOAT[architecture] or "HMMA" in opcodes(built.sass)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 8])
def test_columns(bits: int, architecture: int, tmp_path: Path) -> None:
    """A thread holds all of a row's deviations: no shared memory but for the shares, which are the same for all rows."""
    names = ("weights_ptr", "original_ptr", "deviations_ptr", "shares_ptr", "scale_ptr", "zero_ptr")
    constants: dict[str, object] = {"ZERO": True, "BITS": bits, "COLUMNS": LAUNCHED, "count": LAUNCHED, "BLOCK_R": 32}
    built = build(columns_kernel, dict.fromkeys(names, "*fp32") | {"codes_ptr": "*i8"}, constants, architecture, tmp_path, 1, 1)
    print("columns", bits, architecture, built.registers, built.local, built.shared)
    check(built, architecture)
    assert built.shared <= LAUNCHED * 4 / 1024
