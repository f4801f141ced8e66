"""Scores lists of tokens with vLLM. Runs by itself in vLLM's own environment, where planish is not installed:

    python -I vllm_score.py MODEL TOKENS.json RESULT.json

TOKENS.json: a list of lists of token numbers. RESULT.json: {"version": vLLM's, "means": [mean log-likelihood per token of each list]}.
"""

import importlib
import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_INT4_W4A8": "0",  # otherwise 4-bit weights get 8-bit activations on CPUs with AMX, whatever the checkpoint declares
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(model: str, tokens: str, result: str) -> None:
    """Load the model in bfloat16 and score every list."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    vllm = importlib.import_module("vllm")
    lists = json.loads(Path(tokens).read_text())
    longest = max(map(len, lists)) + 1  # vLLM always generates at least one token
    server = vllm.LLM(model=model, dtype="bfloat16", max_model_len=longest, enforce_eager=True, max_num_seqs=4)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = server.generate([{"prompt_token_ids": ids} for ids in lists], sampling)
    means = []
    for ids, output in zip(lists, outputs):  # noqa: B905  # whichever Python vLLM's environment has
        values = [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        means.append(sum(values) / len(values))
    Path(result).write_text(json.dumps({"version": vllm.__version__, "means": means}))


if __name__ == "__main__":
    main(*sys.argv[1:])
