"""The operators on a GPU, in one run of at most ten minutes: ceilings first, then correctness, then time at the shapes of Llama 3 8B.

python benchmarks/kernels.py [--minutes 9] [--tune] [--json FILE]

Ceilings: copy bandwidth and bfloat16 GEMM, measured. Correctness: fresh random odd shapes, results in memory that was full of NaN before. Time: CUDA
graphs that go through at least 240 MB of weights, so that none comes from the cache, several replays in a row; medians. Floor: the time that the
operands' bytes or the arithmetic take at the ceilings (int8 and float8 at twice the bfloat16 rate). Beside each operator: bfloat16 cuBLAS,
torch._int_mm with scaling, torch._scaled_mm, and vLLM's and GemLite's kernels where they are installed. --tune looks for tile sizes that compute the
same and prints, or writes to FILE, what to put in configs/tuned.json; what is there or in FILE already is not looked for again. Kernels are compiled
side by side, on all cores, before they are measured. What is found is told, and FILE written, as it is found: a run that ends early has told much.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from kernels_right import LINEARS, check, check_quantizers
from torch import Tensor

from planish.quant.kernels import tuning
from planish.quant.solvers import columns

Name = TypeVar("Name", bound=Hashable)

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(out, in) of the linears of Llama 3 8B, q/k/v and gate/up as one."""
TOKENS = (1, 16, 64, 512, 4096)
TUNED = (1, 4096, 512, 64)  # one of a bucket, those that matter first
IN_A_ROW = 5  # replays, so that the GPU waits for a launch before the first only
ROTATED_BYTES = 240_000_000
_WEIGHT_AT = {"linear_w8a8": 3, "linear_w4a8": 3, "linear_w4a4": 3, "linear_w4a16": 1, "linear_fp8": 2}  # among the operands
_WEIGHT_BYTES = {"bf16": 2.0, "linear_w8a8": 1.0, "linear_fp8": 1.0}
_INPUT_BYTES = {"bf16": 2.0, "linear_w4a16": 2.0, "linear_w4a4": 0.5}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes_s: of a copy, read and written; flops: of a bfloat16 GEMM."""

    bytes_s: float
    flops: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, microseconds."""

    op: str
    shape: str
    tokens: int
    us: float
    floor_us: float
    bf16_us: float

    @property
    def of_floor(self) -> float:
        """How near to the floor, 1 at best."""
        return self.floor_us / self.us

    @property
    def times_bf16(self) -> float:
        """Speed against bfloat16 cuBLAS."""
        return self.bf16_us / self.us


def floor_us(op: str, tokens: int, out: int, inputs: int, ceilings: Ceilings) -> float:
    """What no kernel can beat: operands once through memory, or the arithmetic, whichever is longer."""
    moved = out * inputs * _WEIGHT_BYTES.get(op, 0.5) + tokens * inputs * _INPUT_BYTES.get(op, 1.0) + 2 * tokens * out
    rate = ceilings.flops * (1 if op in ("bf16", "linear_w4a16") else 2)
    return 1e6 * max(moved / ceilings.bytes_s, 2 * tokens * out * inputs / rate)


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = ["| op | shape | M | us | floor us | of floor | times bf16 |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {r.op} | {r.shape} | {r.tokens} | {r.us:.1f} | {r.floor_us:.1f} | {100 * r.of_floor:.0f} % | {r.times_bf16:.2f} |" for r in rows]
    return "\n".join(lines)


def graph_us(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Microseconds a call: all of them, each with weights of its own, in one CUDA graph; the median of rounds of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(IN_A_ROW):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / IN_A_ROW / len(calls))
    return statistics.median(times)


def ceilings() -> Ceilings:
    """Measured."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = graph_us([lambda: target.copy_(source)])
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gemm_us = graph_us([lambda: a @ a])
    return Ceilings(2 * source.numel() / copy_us * 1e6, 2 * 8192**3 / gemm_us * 1e6)


def copies(weight: Tensor) -> list[Tensor]:
    """So many of it that ROTATED_BYTES are read, at least two."""
    count = max(2, -(-ROTATED_BYTES // (weight.numel() * weight.element_size())))
    return [weight.clone() for _ in range(count)]


def with_weight(op: str, values: list[object], weight: Tensor) -> list[object]:
    """The operands with another weight."""
    at = _WEIGHT_AT[op]
    return [*values[:at], weight, *values[at + 1 :]]


def linear_us(op: str, tokens: int, out: int, inputs: int) -> float:
    """Of one operator."""
    values, _ = random_on_gpu(op, tokens, out, inputs)
    weight, function = values[_WEIGHT_AT[op]], getattr(torch.ops.planish, op)
    assert isinstance(weight, Tensor)
    return graph_us([partial(function, *with_weight(op, values, one)) for one in copies(weight)])


def random_on_gpu(op: str, tokens: int, out: int, inputs: int) -> tuple[list[object], None]:
    """Operands as `operands` makes them, without the float64 twin."""
    b = {"device": "cuda"}
    if op == "linear_w4a16":
        scale = torch.rand(out, inputs // 128, **b)
        return [
            torch.randn(tokens, inputs, dtype=torch.bfloat16, **b),
            torch.randint(-128, 128, (out, inputs // 2), dtype=torch.int8, **b),
            scale,
            None,
            None,
        ], None
    x_width, w_width = inputs // (2 if op == "linear_w4a4" else 1), inputs // (1 if op in ("linear_w8a8", "linear_fp8") else 2)
    x = torch.randint(-100, 100, (tokens, x_width), dtype=torch.int8, **b)
    w = torch.randint(-100, 100, (out, w_width), dtype=torch.int8, **b)
    grid = torch.rand(tokens, 1, **b), torch.rand(out, **b)
    if op == "linear_fp8":
        return [x.to(torch.float8_e4m3fn), grid[0], w.to(torch.float8_e4m3fn), grid[1], None, torch.bfloat16], None
    return [
        x,
        grid[0],
        torch.zeros(tokens, 1, dtype=torch.int32, **b),
        w,
        grid[1],
        w.sum(1, dtype=torch.int32),
        None,
        None,
        None,
        torch.bfloat16,
    ], None


def bf16_us(tokens: int, out: int, inputs: int) -> float:
    """Of cuBLAS."""
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    weights = copies(torch.randn(out, inputs, device="cuda", dtype=torch.bfloat16))
    return graph_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def peers(tokens: int, out: int, inputs: int) -> dict[str, Callable[[], float]]:
    """Other people's kernels for the same product, as far as they are here and take the shape: what measures each."""
    x, w = (torch.randint(-100, 100, (n, inputs), dtype=torch.int8, device="cuda") for n in (tokens, out))
    a, b = torch.rand(tokens, 1, device="cuda"), torch.rand(out, 1, device="cuda")
    found: dict[str, Callable[[], float]] = {}
    if tokens > 16:
        found["torch._int_mm + scales"] = lambda: graph_us([lambda w=w: (torch._int_mm(x, w.T) * a * b.T).bfloat16() for w in copies(w)])
    if torch.cuda.get_device_capability() >= (8, 9):
        fx, fw = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        found["torch._scaled_mm"] = lambda: graph_us(
            [lambda w=w: torch._scaled_mm(fx, w.T, scale_a=a, scale_b=b.T, out_dtype=torch.bfloat16) for w in copies(fw)]
        )
    if importlib.util.find_spec("vllm"):
        from vllm import _custom_ops as vllm_ops

        found["vLLM cutlass int8"] = lambda: graph_us([lambda w=w: vllm_ops.cutlass_scaled_mm(x, w.T, a, b, torch.bfloat16) for w in copies(w)])
    if importlib.util.find_spec("gemlite"):
        from gemlite.helper import A16W4_INT

        layer = A16W4_INT(device="cuda:0", dtype=torch.bfloat16).from_weights(
            torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device="cuda"),
            torch.rand(out, inputs // 128, device="cuda"),
            torch.full((out, inputs // 128), 8.0, device="cuda"),
            4,
            128,
        )
        wide = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        found["GemLite A16W4 (one weight)"] = lambda: graph_us([lambda: layer(wide)])
    return found


def quantizers_us(tokens: int, width: int, limits: Ceilings) -> list["Row | None"]:
    """The quantizers; their floor is 2 bytes read (4 with silu) and 1 written for every value. Beside them, in place of bf16: a copy of the input.
    The block transform also as torch's product and a quantization of it, whatever the number of tokens."""
    from planish.quant.kernels import cuda

    count = min(256, max(2, ROTATED_BYTES // (2 * tokens * width)))  # of few tokens a cache holds all, which is no help to launches
    x = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    weight, grid, ops = torch.ones(width, device="cuda", dtype=torch.bfloat16), (8, False, 1.0, False), torch.ops.planish
    copy_us = graph_us([lambda v=v: v.clone() for v in x])
    matrix = torch.randn(width // 128, 128, 128, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, tuple[int, list[Callable[[], object]]]] = {
        "quantize_per_token": (3, [lambda v=v: ops.quantize_per_token(v, *grid) for v in x]),
        "rms_norm_quantize": (3, [lambda v=v: ops.rms_norm_quantize(v, weight, 1e-5, *grid) for v in x]),
        "silu_mul_quantize": (5, [lambda v=v, i=i: ops.silu_mul_quantize(v, x[i - 1], *grid) for i, v in enumerate(x)]),
        "hadamard_quantize": (3, [lambda v=v: ops.hadamard_quantize(v, None, width, *grid) for v in x]),
        "blocks_quantize": (3, [lambda v=v: cuda.blocks_quantize(v, matrix, *grid, few=0) for v in x]),
        "blocks, then quantize": (3, [lambda v=v: cuda.blocks_quantize(v, matrix, *grid, few=tokens) for v in x]),
    }
    floors = {name: 1e6 * moved * tokens * width / limits.bytes_s for name, (moved, _) in calls.items()}
    return [attempted(name, f"width {width}", tokens, partial(graph_us, run), floors[name], copy_us) for name, (_, run) in calls.items()]


def columns_us(device: str = "cuda") -> dict[str, float]:
    """A block of GPTQ's columns: in one launch, if that is right, and one after the other, launches and all, as where Triton is not."""
    block = columns.trial(torch.device(device))
    columns.one_by_one(block, 4)
    block.codes_KO.sum().item()
    start = time.perf_counter()
    columns.one_by_one(block, 4)
    block.codes_KO.sum().item()
    found = {"columns, one by one": 1e6 * (time.perf_counter() - start)}
    if columns.launched(block.weights_KO):
        found["columns, in one launch"] = graph_us([partial(columns.launch, block, 4)])
    return found


def attempted(op: str, shape: str, tokens: int, measure: Callable[[], float], floor: float, bf16: float) -> Row | None:
    """The row, told at once; what fails is said and left out."""
    try:
        row = Row(op, shape, tokens, measure(), floor, bf16)
    except Exception as failed:  # noqa: BLE001, as in at_once
        print(f"{op} {shape} {tokens}: {type(failed).__name__}: {failed}", file=sys.stderr)
        return None
    print(json.dumps(asdict(row)), flush=True)
    return row


def at_once(calls: dict[Name, Callable[[], object]]) -> dict[Name, Exception]:
    """All of them in threads, so that what they launch is compiled side by side; those that failed, with why."""

    def attempt(call: Callable[[], object]) -> Exception | None:
        try:
            call()
        except Exception as failed:  # noqa: BLE001, of Triton, LLVM or CUDA: said where the measurement is left out
            return failed
        return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(calls, pool.map(attempt, calls.values()), strict=True))
    return {name: failed for name, failed in found.items() if failed is not None}


def launch(op: str, values: list[object], config: tuning.Config | None = None) -> object:
    """The operator's Triton kernel with that configuration."""
    from planish.quant.kernels import cuda

    return cuda.linear_w4a16(*values, config=config) if op == "linear_w4a16" else cuda.integer_linear(op, *values, config=config)


def compared(op: str, values: list[object], config: tuning.Config, expected: object) -> None:
    """Launch once. ValueError: what comes out is something else than expected."""
    y = launch(op, values, config)
    assert isinstance(y, Tensor)
    assert isinstance(expected, Tensor)
    if not bool((y.float() - expected.float()).abs().max() <= 0.01 * expected.float().abs().max()):
        raise ValueError("another result than the rule of thumb's")


def best_config(op: str, tokens: int, out: int, inputs: int, rounds: int = 3) -> tuning.Config:
    """By steps to the best of the neighbours, from the rule of thumb on."""
    values, _ = random_on_gpu(op, tokens, out, inputs)
    weights, timed = copies(values[_WEIGHT_AT[op]]), dict[tuning.Config, float]()
    best = tuning.rule(op, tokens, out)
    expected = launch(op, values, best)
    for _ in range(rounds):
        fresh = [config for config in (best, *tuning.neighbours(best, tokens)) if config not in timed]
        failed = at_once({config: partial(compared, op, values, config, expected) for config in fresh})
        torch.cuda.synchronize()
        for config in fresh:
            calls = [partial(launch, op, with_weight(op, values, weight), config) for weight in weights]
            timed[config] = float("inf") if config in failed else graph_us(calls, 3)
        if best == (best := min(timed, key=timed.__getitem__)):
            break
    return best


def tune(until: float, file: Path | None) -> str:
    """The best configurations found for every operator, shape and number of tokens, as far as time allows, beside those of the file."""
    best = tuning.tuned(file) if file is not None and file.exists() else {}
    for tokens, op, (out, inputs) in product(TUNED, LINEARS[:4], SHAPES.values()):
        name = tuning.key(torch.cuda.get_device_name(), op, tokens, out, inputs // (1 if op == "linear_w8a8" else 2))
        if time.monotonic() > until or name in best or name in tuning.tuned():
            continue
        try:
            best[name] = best_config(op, tokens, out, inputs)
        except Exception as failed:  # noqa: BLE001, as in at_once
            print(f"{name}: {type(failed).__name__}: {failed}", file=sys.stderr)
            continue
        print(json.dumps({name: astuple(best[name])}), flush=True)
        if file is not None:
            file.write_text(tuning.stored(best))
    return tuning.stored(best)


def compiled(until: float) -> None:
    """Every Triton kernel that will be measured, so that it is there when its turn comes."""
    calls = {}
    for tokens, op, (name, (out, inputs)) in product(TOKENS, LINEARS[:4], SHAPES.items()):
        if time.monotonic() < until:
            calls[op, name, tokens] = partial(launch, op, random_on_gpu(op, tokens, out, inputs)[0])
    for what, failed in at_once(calls).items():
        print(f"{what}: {type(failed).__name__}: {failed}", file=sys.stderr)
    torch.cuda.synchronize()


def measured(tokens: int, shape: str, limits: Ceilings) -> list[Row | None]:
    """All of one shape."""
    out, inputs = SHAPES[shape]
    bf16 = bf16_us(tokens, out, inputs)
    floors = {op: floor_us(op, tokens, out, inputs, limits) for op in ("bf16", *LINEARS)}
    others = [attempted(name, shape, tokens, run, floors["linear_w8a8"], bf16) for name, run in peers(tokens, out, inputs).items()]
    ours = [attempted(op, shape, tokens, partial(linear_us, op, tokens, out, inputs), floors[op], bf16) for op in LINEARS]
    return [Row("bf16", shape, tokens, bf16, floors["bf16"], bf16), *ours, *others]


def all_rows(limits: Ceilings, until: float, file: Path | None) -> list[Row]:
    """As far as time allows."""
    rows: list[Row] = []
    for tokens in TOKENS:
        jobs: list[Callable[[], list[Row | None]]] = [partial(measured, tokens, shape, limits) for shape in SHAPES]
        for job in [*jobs, *(partial(quantizers_us, tokens, width, limits) for width in (4096, 14336))]:
            rows += [row for row in (job() if time.monotonic() < until else []) if row is not None]
            if file is not None:
                file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def main() -> int:
    """All of it; 1 if a result is wrong, 2 without a GPU."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=9)
    p.add_argument("--tune", action="store_true")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device, and torch sees none here. On a CPU: benchmarks/cpu_speed.py.", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * a.minutes
    limits = ceilings()
    print(json.dumps({"device": torch.cuda.get_device_name(), **asdict(limits)}), flush=True)
    seeds = range(int(time.time()), int(time.time()) + 4)
    wrong = check("cuda", seeds) + check_quantizers("cuda", seeds)
    print("\n".join(wrong) or "all operators are right at fresh random shapes", flush=True)
    print(json.dumps(columns_us()), flush=True)
    if a.tune:
        print(tune(until, a.json))
        return bool(wrong)
    compiled(until)
    print(table(all_rows(limits, until, a.json)))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
