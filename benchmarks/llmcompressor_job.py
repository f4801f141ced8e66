"""One compression by llm-compressor, measured as against_llmcompressor.py measures planish's. Runs in llm-compressor's own environment:

    PEER/bin/python -I benchmarks/llmcompressor_job.py --job w8a8 --model DIR --calibration TEXT --evaluation TEXT --samples 32 --length 512 \
        --windows 4 --dtype bfloat16

-I, for transformers looks for a package `kernels`, and would find the file of that name beside this one. Prints a JSON line: seconds of oneshot
alone, the process's peak resident memory when it ends in GB, and the perplexity of the model that it leaves in memory, whose linears round as the
scheme says, in float32 arithmetic.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def scheme(weight_bits: int, activation_bits: int | None = None, *, group: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    """Symmetric weights, per channel or in groups; activations per token, or in full precision; the head stays."""
    weights = {"num_bits": weight_bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel", "dynamic": False}
    found: dict[str, Any] = {"targets": ["Linear"], "weights": weights | ({"group_size": group} if group else {})}
    if activation_bits:
        found["input_activations"] = {"num_bits": activation_bits, "type": "int", "symmetric": symmetric, "strategy": "token", "dynamic": True}
    return {"config_groups": {"all": found}, "ignore": ["lm_head"]}


def rotated(*rotations: str) -> Any:
    """Random Hadamard matrices."""
    return SpinQuantModifier(rotations=list(rotations), transform_type="random-hadamard")


IntermediatesCache._pin_intermediate = staticmethod(lambda value: None)  # AWQ's cache pins memory also where there is no accelerator, and fails

# 64: the largest usual group that divides SmolLM2's widths.
JOBS: dict[str, Callable[[], list[Any]]] = {
    "w8a8": lambda: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**scheme(8, 8))],
    "w4a4": lambda: [rotated("R1", "R2", "R4"), GPTQModifier(**scheme(4, 4))],
    "w4a8": lambda: [GPTQModifier(**scheme(4, 8, symmetric=False))],
    "w4a8-rotated": lambda: [rotated("R1", "R2"), GPTQModifier(**scheme(4, 8, symmetric=False))],
    "w4a16": lambda: [GPTQModifier(**scheme(4, group=64))],
    "w4a16-awq": lambda: [AWQModifier(), QuantizationModifier(**scheme(4, group=64))],
    "w4a16-rotated": lambda: [rotated("R1", "R2"), GPTQModifier(**scheme(4, group=64))],
}


@torch.no_grad()
def perplexity(model: Any, ids_T: torch.Tensor, windows: int, length: int = 2048) -> float:
    """Of the text's first windows."""
    lost = []
    for ids_L in ids_T[: windows * length].split(length)[:windows]:
        logits_LV = model(ids_L[None]).logits[0, :-1].float()
        lost.append(torch.nn.functional.cross_entropy(logits_LV, ids_L[1:], reduction="none"))
    return math.exp(float(torch.cat(lost).mean()))


def main() -> None:
    """Compress, then evaluate."""
    p = argparse.ArgumentParser()
    p.add_argument("--job", required=True, choices=JOBS)
    p.add_argument("--model", required=True)
    p.add_argument("--calibration", type=Path, required=True)
    p.add_argument("--evaluation", type=Path, required=True)
    p.add_argument("--samples", type=int, required=True)
    p.add_argument("--length", type=int, required=True)
    p.add_argument("--windows", type=int, required=True)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    a = p.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval()
    ids = tokenizer(a.calibration.read_text(), verbose=False).input_ids
    rows = [ids[i * a.length : (i + 1) * a.length] for i in range(a.samples)]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    start = time.monotonic()
    oneshot(model=model, dataset=data, recipe=JOBS[a.job](), num_calibration_samples=a.samples, max_seq_length=a.length)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    value = perplexity(model.float(), torch.tensor(tokenizer(a.evaluation.read_text(), verbose=False).input_ids), a.windows)
    tool = f"llm-compressor {a.job} {a.dtype}"
    print(json.dumps({"tool": tool, "perplexity": round(value, 4), "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}))


if __name__ == "__main__":
    main()
