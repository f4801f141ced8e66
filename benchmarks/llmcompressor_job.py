"""One compression by llm-compressor, measured as against_llmcompressor.py measures planish's. Runs in llm-compressor's own environment:

    PEER/bin/python benchmarks/llmcompressor_job.py --job w8a8 --model DIR --calibration TEXT --evaluation TEXT --samples 32 --length 512 \
        --windows 4 --dtype bfloat16

Prints a JSON line: seconds of oneshot alone, the process's peak resident memory when it ends in GB, and the perplexity of the model that it leaves in
memory, whose linears round as the scheme says, in float32 arithmetic.
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
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def gptq(bits: int) -> Any:
    """Weights of that many bits per channel and activations of as many per token, both symmetric; the head stays."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return GPTQModifier(config_groups={"all": group}, ignore=["lm_head"])


JOBS: dict[str, Callable[[], list[Any]]] = {
    "w8a8": lambda: [SmoothQuantModifier(smoothing_strength=0.8), gptq(8)],
    "w4a4": lambda: [SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"), gptq(4)],
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
    print(json.dumps({"tool": f"llm-compressor {a.dtype}", "perplexity": round(value, 4), "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}))


if __name__ == "__main__":
    main()
