"""A real server scores the tokens that planish scores: what it computes from the checkpoint must be what was measured."""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calib.checkpoint import Checkpoint
from ..quant.errors import PlanishError, nearest
from .check import Check
from .score import Report, score

SERVERS = ("vllm",)
ENVIRONMENT = "PLANISH_VLLM_ENV"
TOLERANCE = 0.02  # nats per token, of each list's mean: bfloat16 sums in another order, a few times over
SCRIPT = Path(__file__).with_name("vllm_score.py")
SECONDS = 1800
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
            raise ServerFailed(_reason(run.stdout + run.stderr) or f"exit status {run.returncode}")
        answer = json.loads(result.read_text())
    return Served(answer["version"], tuple(answer["means"]))


def _reason(output: str) -> str:
    """The last lines that name an error, or the last ones."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("File ")]
    return " | ".join((errors or lines)[-2:])[-600:]


def check_server(checkpoint: Checkpoint, ids_NL: Tensor, python: Path, *, device: torch.device | str = "cpu", report: Report | None = None) -> Check:
    """vLLM's mean log-likelihood of each list against planish's own, both in bfloat16."""
    try:
        served = serve(python, checkpoint.path, ids_NL)
    except ServerFailed as failure:
        return Check("server", False, f"vLLM did not run the checkpoint: {failure}", {})
    own = score(checkpoint, ids_NL, dtype=torch.bfloat16, device=device, progress=report)
    differences = [abs(theirs + nll) for theirs, nll in zip(served.means, own.windows, strict=True)]
    worst = max(differences)
    figures = {
        "version": served.version,
        "server_mean": sum(served.means) / len(served.means),
        "own_mean": -own.nll,
        "largest_difference": worst,
        "tolerance": TOLERANCE,
        "lists": len(own.windows),
        "tokens": own.tokens,
    }
    message = (
        f"vLLM {served.version}: mean log-likelihood {figures['server_mean']:.4f}, planish {-own.nll:.4f}; "
        f"largest difference of a list {worst:.4f} (at most {TOLERANCE})"
    )
    return Check("server", worst <= TOLERANCE, message, figures)
