"""Prefill and decode of a Llama 3 8B with random weights on a GPU, bfloat16 against the packed schemes, in one run.

python benchmarks/end_to_end.py [--layers 32] [--tokens 8192] [--steps 64] [--schemes w8a8 w8a8-fp8 w4a8 w4a4 w4a4-rotated w4a16]

Decode runs in a CUDA graph. The quantized models are the bfloat16 one with its blocks' linears, norms and MLPs replaced as planish.load does: random
codes would do, it is speed that is measured. Tokens per second, medians.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from planish.calib.blocks.topology import topology
from planish.calib.compressed.packed import fuse, packed_readers
from planish.calib.compressed.quantized import put
from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat, code_dtype
from planish.quant.linear import Parts
from planish.quant.transforms.factors import Chain, Hadamard
from planish.quant.transforms.hadamard import hadamard_block

ROTATED = "w4a4-rotated"  # a Hadamard rotation of every site's input at run time
SCHEMES: dict[str, tuple[WeightFormat, ActivationFormat | None]] = {
    "w8a8": (WeightFormat(bits=8), ActivationFormat(bits=8)),
    "w8a8-fp8": (WeightFormat(bits=8, type="float"), ActivationFormat(bits=8, type="float")),
    "w4a8": (WeightFormat(bits=4), ActivationFormat(bits=8, symmetric=False)),
    "w4a4": (WeightFormat(bits=4), ActivationFormat(bits=4, symmetric=False)),
    ROTATED: (WeightFormat(bits=4), ActivationFormat(bits=4, symmetric=False)),
    "w4a16": (WeightFormat(bits=4, granularity="group", group_size=128), None),
}


def config(layers: int, hidden: int = 4096, inner: int = 14336, vocabulary: int = 128256) -> LlamaConfig:
    """Llama 3 8B's shape, or a smaller one."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def packed(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """The model, its blocks' linears replaced in place by what planish.load would put there, with random codes."""
    known = topology(model.config)
    for index in range(known.block_count):
        block = model.get_submodule(known.block_name(index))
        for site in known.block(index).sites:
            readers = [block.get_submodule(path) for path in site.readers]
            chain = (Hadamard(hadamard_block(readers[0].in_features)),) if scheme == ROTATED else ()
            for path, layer in zip(site.readers, packed_readers([random_parts(reader, scheme, chain) for reader in readers]), strict=True):
                put(block, path, layer)
    fuse(model, model.config, "", torch.bfloat16)
    return model


def random_parts(linear: nn.Module, scheme: str, chain: Chain) -> Parts:
    """Codes and scales for a linear layer of this shape, on its device."""
    weights, activations = SCHEMES[scheme]
    assert isinstance(linear, nn.Linear)
    out, inputs, top = linear.out_features, linear.in_features, 1 << weights.bits - 1
    codes = torch.randint(-top, top, (out, inputs), dtype=torch.int8, device=linear.weight.device).to(code_dtype(weights.kind))
    scale = torch.full((out, weights.groups(inputs)), 0.02 / top, device=codes.device).bfloat16().float()
    return Parts(QuantizedWeight(codes, scale, None, weights), None, activations, None, chain, linear.weight.dtype, None)


def median_s(run: Callable[[], object], rounds: int) -> float:
    """Seconds a call."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def speeds(model: PreTrainedModel, tokens: int, steps: int) -> dict[str, float]:
    """Tokens per second of prefill and of decode, batch 1."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    prefill = median_s(lambda: model(ids, logits_to_keep=1, use_cache=False), 5)
    cache = StaticCache(config=model.config, max_cache_len=tokens + 4 * steps + 16)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    one, place = ids[:, :1].clone(), torch.tensor([[tokens]], device="cuda")
    for _ in range(3):
        model(one, past_key_values=cache, use_cache=True, position_ids=place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(one, past_key_values=cache, use_cache=True, position_ids=place)
    return {"prefill": tokens / prefill, "decode": 1 / median_s(graph.replay, steps)}


def table(found: dict[str, dict[str, float]]) -> str:
    """Tokens per second, and times the speed of bf16, as Markdown."""
    lines = ["| scheme | prefill tokens/s | times bf16 | decode tokens/s | times bf16 |", "|---|---|---|---|---|"]
    base = found["bf16"]
    for name, got in found.items():
        cells = [f"{got[job]:.0f} | {got[job] / base[job]:.2f}" for job in ("prefill", "decode")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 2 without a GPU."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=list(SCHEMES))
    a = p.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/end_to_end.py needs a CUDA device, and torch sees none here. On a CPU: benchmarks/cpu_speed.py.", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config(a.layers), dtype=torch.bfloat16).eval()
    found = {"bf16": speeds(base, a.tokens, a.steps)}
    print(json.dumps({"scheme": "bf16"} | found["bf16"]), flush=True)
    for scheme in a.schemes:
        model = packed(copy.deepcopy(base), scheme)
        found[scheme] = speeds(model, a.tokens, a.steps)
        print(json.dumps({"scheme": scheme} | found[scheme]), flush=True)
        del model
        torch.cuda.empty_cache()
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
