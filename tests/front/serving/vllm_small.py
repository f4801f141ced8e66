"""Log-probabilities of every token of lists by vLLM, for small models one after the other. Run by vLLM's own interpreter, see test_vllm_plugin.py:

python vllm_small.py RANKS TOKENS.json RESULT.json FOLDER ...
"""

import gc
import json
import os
import sys
from pathlib import Path

import vllm  # pyright: ignore[reportMissingImports]
from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]


def scored(folder: str, lists: list[list[int]], ranks: int) -> list[list[float]]:
    """In float32, each rank in a process of its own if there are several."""
    server = vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    )
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = server.generate([{"prompt_token_ids": ids} for ids in lists], sampling, use_tqdm=False)
    return [[output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))] for ids, output in zip(lists, outputs, strict=True)]


def main(ranks: str, tokens: str, result: str, *folders: str) -> None:
    """Write [[log-probabilities of each list] of each model]."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks have no cores of their own here
    if ranks == "1":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    lists, found = json.loads(Path(tokens).read_text()), []
    for folder in folders:
        found.append(scored(folder, lists, int(ranks)))
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
