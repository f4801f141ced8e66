"""A real server scores the tokens that planish scores: what it computes from the checkpoint must be what was measured.

Two correct evaluations differ: last bits decide which code an activation gets. With int4 weights and int8 activations single tokens of a small model
come out 0.35 nats apart (standard deviation, planish against itself with its last bits disturbed), so the mean of a window of 512 tokens is uncertain
by 0.015, that of 4 windows of 2048 by 0.004. The bar is for the mean over all windows; give it thousands of tokens.

vLLM 0.32 on an x86 CPU runs 4-bit weights with 8-bit activations in PyTorch's reference kernel: 10 tokens a second, and the same answer to the last
digit whether the checkpoint declares the activations symmetric or not. Without VNNI its products of bytes are wrong (up to a fifth of a sum of random
ones) and 4-bit weights with 16-bit activations have no kernel.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...calib.files.checkpoint import Checkpoint
from ...calib.machine.device import give_back
from ...quant.errors import PlanishError, nearest
from ...quant.kernels.cpu import exact
from ..scores.check import Check, Figure
from ..scores.score import Report, score

SERVERS = ("vllm",)
ENVIRONMENT = "PLANISH_VLLM_ENV"
TOLERANCE = 0.02  # nats per token, mean over all
SCRIPT = Path(__file__).with_name("vllm_score.py")
SECONDS = 1800
_OVERFLOW = (
    "This CPU has neither VNNI nor AMX: vLLM's products of 8-bit codes overflow on it (oneDNN adds pairs of them in 16 bits), "
    "and its 4-bit weights have no kernel there. Of integer codes this says nothing then; ask a machine that has either"
)
_COMMANDS = f"Make one with `make server-env` (2.5 GB) and set {ENVIRONMENT} to its folder, ~/.cache/planish/vllm-0.32.0 by default"


@dataclass(frozen=True, slots=True)
class Served:
    """What the server says. means: mean log-likelihood per token of each list."""

    version: str
    means: tuple[float, ...]


class ServerFailed(Exception):
    """The server did not load or run the checkpoint; the message is the end of what it printed."""


def server_python(name: str, environment: str | Path | None = None) -> Path:
    """The interpreter of the server's own environment. environment: a virtual environment's folder; None: what PLANISH_VLLM_ENV says.

    Errors: an unknown server, no environment said, or none there.
    """
    if name not in SERVERS:
        raise PlanishError(f"server {name!r} is unknown. {nearest(name, SERVERS)}")
    folder = environment or os.environ.get(ENVIRONMENT)
    if not folder:
        raise PlanishError(f"server vllm: no environment is set. {_COMMANDS}.")
    python = Path(folder).expanduser() / "bin" / "python"
    if not python.is_file():
        raise PlanishError(f"server vllm: {python} does not exist, so {folder} is no virtual environment. {_COMMANDS}.")
    return python


def serve(python: Path, folder: Path, ids_NL: Tensor, seconds: float = SECONDS) -> Served:
    """Let vLLM load the checkpoint in bfloat16 and score each row of ids. Raises ServerFailed."""
    with tempfile.TemporaryDirectory(prefix="planish-") as scratch:
        tokens, result = Path(scratch) / "tokens.json", Path(scratch) / "result.json"
        tokens.write_text(json.dumps(ids_NL.tolist()))
        command = [str(python), "-I", str(SCRIPT), str(folder.resolve()), str(tokens), str(result)]
        try:
            run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"no answer within {seconds:.0f} seconds") from None
        if run.returncode or not result.is_file():
            raise ServerFailed(f"exit status {run.returncode}: {_reason(run.stdout + run.stderr)}")
        answer = json.loads(result.read_text())
    return Served(answer["version"], tuple(answer["means"]))


def _reason(output: str) -> str:
    """The last lines that name an error, or the last ones. Warnings may quote errors that did no harm."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "WARNING" not in line]
    return " | ".join((errors or lines)[-2:])[-600:]


def check_server(checkpoint: Checkpoint, ids_NL: Tensor, python: Path, *, device: torch.device | str = "cpu", report: Report | None = None) -> Check:
    """vLLM's mean log-likelihood per token against planish's own, both in bfloat16. ids_NL: windows; cut so that the server can add one token."""
    longest = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", ids_NL.shape[1] + 1)
    ids_NL = ids_NL[:, : longest - 1]
    give_back(device)  # vLLM asks for nearly all of a GPU
    try:
        served = serve(python, checkpoint.path, ids_NL)
    except ServerFailed as failure:
        return Check("server", False, _told(f"vLLM did not run the checkpoint: {failure}"), {})
    own = score(checkpoint, ids_NL, dtype=torch.bfloat16, device=device, progress=report)
    theirs = sum(served.means) / len(served.means)
    difference = theirs + own.nll
    figures: dict[str, Figure] = {
        "version": served.version,
        "server_mean": theirs,
        "own_mean": -own.nll,
        "difference": difference,
        "tolerance": TOLERANCE,
        "largest_window_difference": max(abs(mean + nll) for mean, nll in zip(served.means, own.windows, strict=True)),
        "windows": len(own.windows),
        "tokens": own.tokens,
    }
    message = (
        f"vLLM {served.version}: mean log-likelihood {theirs:.4f} per token, planish {-own.nll:.4f}, over {own.tokens} tokens; "
        f"difference {difference:+.4f}, allowed {TOLERANCE}"
    )
    met = abs(difference) <= TOLERANCE
    return Check("server", met, message if met else _told(message), figures)


def _told(failure: str) -> str:
    """With what explains it where vLLM computes on this CPU and oneDNN's products are not exact."""
    return failure if exact() or torch.cuda.is_available() else f"{failure}. {_OVERFLOW}"
