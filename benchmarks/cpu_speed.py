"""Speed on a CPU: checkpoints as planish.load gives them beside the bfloat16 model as transformers gives it, taken in turns in one run.

python benchmarks/cpu_speed.py MODEL [--schemes w8a8 w4a16] [--tokens 512] [--rounds 9] [--threads 2] [--compiled] [--ceilings AVX512_CORE_VNNI]

The checkpoints are written first, rounded to nearest: it is speed that is measured. Prefill: one forward pass over --tokens, the logits of the last
one, as generate() asks, on both sides; a decode step comes after a context of --tokens, in a static cache. Each figure is the best of all rounds.
float32 is the model as one would run it where the processor has no instructions for bfloat16.

Eager is what a user gets who does nothing: transformers' modules on the one side, planish's fused ones on the other. --compiled adds torch.compile of
both, for minutes. Each ceiling is a further run in a process whose oneDNN knows no newer instructions: AVX512_CORE_VNNI stands for a processor with
AVX512-VNNI and neither AMX nor bfloat16 instructions; planish leaves AMX alone there, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import planish
from planish.calib.compressed.packed import kernels_used
from planish.recipe.schema import Recipe, load_recipe, with_settings

QUICK = ("solver=rtn", "calibration.samples=1", "calibration.length=64", "calibration.batch_size=1")
SCHEMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "w8a8": ("w8a8", ("steps=[]",)),
    "w4a8": ("w4a8", ("steps=[]",)),
    "w4a16": ("w4a16-g128", ("scheme.weights.group_size=64",)),
}


def recipe(scheme: str) -> Recipe:
    """Of the shipped recipe, the formats; rounding to nearest in the place of all that takes time."""
    name, settings = SCHEMES[scheme]
    return with_settings(load_recipe(name), (*QUICK, *settings))


def prefill(model: Callable[..., object], ids: torch.Tensor) -> Callable[[], object]:
    """One forward pass over ids, the logits of the last token."""
    return lambda: model(ids, logits_to_keep=1, use_cache=False)


def decode(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], object]:
    """One step for one token after ids, always the same one, in a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 1)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    place = torch.tensor([[ids.shape[1]]])

    def step() -> object:
        for layer in cache.layers:  # back to the context's end
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(ids.shape[1]) if torch.is_tensor(layer.cumulative_length) else setattr(
                    layer, "cumulative_length", ids.shape[1]
                )
        return model(ids[:, :1], past_key_values=cache, use_cache=True, position_ids=place)

    return step


def measured(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, the best of all rounds, in turns."""
    for run in runs.values():
        run()
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def ratios(best: dict[str, float]) -> dict[str, float]:
    """How many times as fast as bf16 in the same setting each is. Names are scheme/setting."""
    return {name: best[f"bf16/{name.partition('/')[2]}"] / value for name, value in best.items()}


def loaded(model: Path, folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The models side by side; what the quantized ones run on goes to stderr."""
    base = {
        name: AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))
    }
    models = base | {scheme: planish.load(folder, dtype=torch.bfloat16, device="cpu") for scheme, folder in folders.items()}
    for scheme in folders:
        kinds = list(kernels_used(models[scheme]).values())
        print(scheme, {kind: kinds.count(kind) for kind in sorted(set(kinds))}, file=sys.stderr)
    return models


def measure(model: Path, folders: dict[str, Path], a: argparse.Namespace) -> list[dict[str, object]]:
    """All jobs in this process, one JSON line each."""
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    models = loaded(model, folders)
    ids = torch.randint(0, models["bf16"].config.vocab_size, (1, a.tokens), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, object]] = []
    for job in a.jobs:
        runs = {f"{scheme}/eager": (prefill if job == "prefill" else decode)(m, ids) for scheme, m in models.items()}
        if a.compiled and job == "prefill":
            runs |= {f"{scheme}/compiled": prefill(torch.compile(m, dynamic=False), ids) for scheme, m in models.items()}
        best = measured(runs, a.rounds)
        row = {"job": job, "ceiling": os.environ.get("ONEDNN_MAX_CPU_ISA", "none"), "tokens": a.tokens, "threads": a.threads}
        found.append(row | {"ms": {k: round(v, 2) for k, v in best.items()}, "times_bf16": {k: round(v, 3) for k, v in ratios(best).items()}})
        print(json.dumps(found[-1]), flush=True)
    return found


def below(ceiling: str, folder: Path, a: argparse.Namespace) -> list[dict[str, object]]:
    """The same in a process of its own, eager, under a ceiling that is read when oneDNN starts."""
    options = ["--folder", str(folder), "--tokens", str(a.tokens), "--rounds", str(max(2, a.rounds // 3)), "--threads", str(a.threads)]
    command = [sys.executable, __file__, str(a.model), *options, "--schemes", *a.schemes, "--jobs", *a.jobs, "--ceilings"]
    ran = subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": ceiling}, check=True, stdout=subprocess.PIPE, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    print("\n".join(lines), flush=True)
    return [json.loads(line) for line in lines]


def table(found: list[dict[str, object]]) -> str:
    """One row for each figure."""
    lines = ["| job | oneDNN's ceiling | scheme | setting | ms | times bf16's speed, same setting |", "|---|---|---|---|---|---|"]
    for row in found:
        ms, times = row["ms"], row["times_bf16"]
        assert isinstance(ms, dict)
        assert isinstance(times, dict)
        lines += [f"| {row['job']} | {row['ceiling']} | {name.replace('/', ' | ')} | {ms[name]:.1f} | {times[name]:.2f} |" for name in ms]
    return "\n".join(lines)


def main() -> None:
    """Measure and print: one JSON line for each job, and a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=["w8a8", "w4a16"])
    p.add_argument("--jobs", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compiled", action="store_true", help="prefill compiled by torch.compile, too; needs a C++ compiler")
    p.add_argument("--ceilings", nargs="*", default=["AVX512_CORE_VNNI"], help="values of ONEDNN_MAX_CPU_ISA; none: no further runs")
    p.add_argument("--folder", type=Path, help="where the checkpoints lie, or are written to; default: a temporary one")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary)
        folders = {scheme: folder / scheme for scheme in a.schemes}
        for scheme, where in folders.items():
            if not where.is_dir():
                planish.compress(recipe(scheme), a.model, where)
        found = measure(a.model, folders, a)
        for ceiling in a.ceilings:
            found += below(ceiling, folder, a)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
