"""Speed on a CPU beside the bfloat16 model in transformers: prefill and decode, plain and compiled, taken in turns in one run.

python benchmarks/cpu_speed.py MODEL [--schemes w8a8 w4a16] [--tokens 512] [--rounds 9] [--threads 2] [--no-compile]

The quantized models are compressed here by plain rounding, for it is speed that is measured, and loaded by planish.load with kernels `packed`
(plain) and `compiled`. bfloat16 is transformers' model as it is, and with every block compiled likewise. A prefill gives the last token's logits,
without a cache; a decode step comes after a context of --tokens in a static cache, and is not compiled. Each figure is the best of all rounds.
Compiling needs a C++ compiler.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import planish
from planish.calib.topology import topology
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.solvers import Rtn
from planish.recipe import Recipe

SCHEMES = {
    "w8a8": Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8)),
    "w4a8": Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=8, symmetric=False)),
    "w4a16": Scheme(weights=WeightFormat(bits=4, granularity="group", group_size=64)),
}


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    """With its blocks compiled, one by one."""
    for block in model.get_submodule(topology(model.config).blocks).children():
        block.compile()
    return model


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], object]:
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


def rows(job: str, best: dict[str, float]) -> list[str]:
    """Lines of the table. best: milliseconds by scheme/setting."""
    plain, least = best["bf16/plain"], min(ms for name, ms in best.items() if name.startswith("bf16"))
    return [f"| {job} | {name.replace('/', ' | ')} | {ms:.1f} | {plain / ms:.2f} | {least / ms:.2f} |" for name, ms in best.items()]


def main() -> None:
    """Measure and print: one JSON line for each job, and a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=["w8a8", "w4a16"])
    p.add_argument("--jobs", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--no-compile", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    settings = ["plain"] if a.no_compile or shutil.which("g++") is None else ["plain", "compiled"]
    models: dict[str, PreTrainedModel] = {}
    for setting in settings:
        base = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16, local_files_only=True).eval()
        models[f"bf16/{setting}"] = compiled(base) if setting == "compiled" else base
    with tempfile.TemporaryDirectory() as folder:
        for scheme in a.schemes:
            out = Path(folder) / scheme
            planish.compress(Recipe(name=scheme, scheme=SCHEMES[scheme], solver=Rtn()), a.model, out)
            for setting in settings:
                models[f"{scheme}/{setting}"] = planish.load(out, kernels="packed" if setting == "plain" else "compiled")
    ids = torch.randint(0, base.config.vocab_size, (1, a.tokens), generator=torch.Generator().manual_seed(0))
    lines = []
    for job in a.jobs:
        if job == "prefill":
            runs = {name: prefill(model, ids) for name, model in models.items()}
        else:
            runs = {name: decode(model, ids) for name, model in models.items() if name.endswith("plain")}
        best = measured(runs, a.rounds)
        print(json.dumps({"job": job, "tokens": a.tokens, "threads": a.threads, "ms": {k: round(v, 2) for k, v in best.items()}}), flush=True)
        lines += rows(job, best)
    print("\n| job | scheme | setting | ms | times plain bf16's speed | times the best bf16's |\n|---|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
