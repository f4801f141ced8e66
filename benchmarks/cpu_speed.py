"""Speed on a CPU beside the bfloat16 model in transformers: prefill and decode, plain and compiled, taken in turns in one run.

python benchmarks/cpu_speed.py MODEL [--schemes w8a8 w4a16] [--tokens 512] [--rounds 9] [--threads 2] [--no-compile]

The quantized models are the same one with its blocks' linears rounded to nearest and replaced by PackedLinear: it is speed that is measured. A
prefill gives the last token's logits, as generate() asks; a decode step comes after a context of --tokens. Each figure is the best of all rounds.
Compiling needs a C++ compiler. The table's ratio is the best of a scheme against the best of bfloat16.
"""

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat, scale_and_zero, to_codes, weight_range
from planish.quant.kernels import PackedLinear

SCHEMES: dict[str, tuple[WeightFormat, ActivationFormat | None]] = {
    "w8a8": (WeightFormat(bits=8), ActivationFormat(bits=8)),
    "w4a8": (WeightFormat(bits=4), ActivationFormat(bits=8, symmetric=False)),
    "w4a16": (WeightFormat(bits=4, granularity="group", group_size=64), None),
}


def rounded(w_OI: torch.Tensor, fmt: WeightFormat) -> QuantizedWeight:
    """The weight rounded to nearest, scales in bfloat16."""
    scale, _ = scale_and_zero(*weight_range(w_OI, fmt), fmt.bits, symmetric=True, dtype=torch.bfloat16)
    codes_OGI = to_codes(w_OI.reshape(len(w_OI), scale.shape[1], -1), scale[:, :, None], None, fmt.bits)
    return QuantizedWeight(codes_OGI.flatten(1).to(torch.int8), scale, None, fmt)


def quantized(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """A copy with packed linears in its blocks."""
    weights, activations = SCHEMES[scheme]
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            packed = PackedLinear(rounded(module.weight.detach().float(), weights), module.bias, activations, dtype=module.weight.dtype)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed)
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


def ratios(best: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the best of bfloat16 each scheme is at its best. Names are scheme/setting."""
    by_scheme: dict[str, float] = {}
    for name, value in best.items():
        scheme = name.partition("/")[0]
        by_scheme[scheme] = min(value, by_scheme.get(scheme, value))
    return {scheme: by_scheme["bf16"] / value for scheme, value in by_scheme.items()}


def main() -> None:
    """Measure and print: one JSON line for each job, and a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=["w8a8", "w4a16"])
    p.add_argument("--jobs", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--layers", type=int, help="only the first so many blocks")
    p.add_argument("--no-compile", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    few = {} if a.layers is None else {"num_hidden_layers": a.layers}
    base = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16, local_files_only=True, **few).eval()
    models = {"bf16": base} | {scheme: quantized(base, scheme) for scheme in a.schemes}
    settings = ["plain"] if a.no_compile or shutil.which("g++") is None else ["plain", "compiled"]
    ids = torch.randint(0, base.config.vocab_size, (1, a.tokens), generator=torch.Generator().manual_seed(0))
    lines = []
    for job in a.jobs:
        runs: dict[str, Callable[[], object]] = {}
        for scheme, model in models.items():
            for setting in settings:
                runs[f"{scheme}/{setting}"] = (prefill if job == "prefill" else decode)(
                    torch.compile(model, dynamic=False) if setting == "compiled" else model, ids
                )
        best = measured(runs, a.rounds)
        found = {"job": job, "tokens": a.tokens, "threads": a.threads, "ms": {k: round(v, 2) for k, v in best.items()}}
        print(json.dumps(found | {"times_bf16": {k: round(v, 3) for k, v in ratios(best).items()}}), flush=True)
        lines += [
            f"| {job} | {name.replace('/', ' | ')} | {ms:.1f} | {min(v for k, v in best.items() if k[:4] == 'bf16') / ms:.2f} |"
            for name, ms in best.items()
        ]
    print("\n| job | scheme | setting | ms | times the best bf16's speed |\n|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
