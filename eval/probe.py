"""The probe: what the quantized model in memory said of a few tokens, kept in the checkpoint, so that a reload can be held against it.

OUT/planish/probe.safetensors (B windows of L tokens, k = 8):
    input_ids         (B, L) int64
    next_logprobs     (B, L - 1) float32   log-probability of each token that follows
    top_ids           (B, L, k) int32      the k likeliest next tokens, likeliest first
    top_logits        (B, L, k) float32    and their logits
    last_hidden       (B, D)               hidden states of each window's last token after the last block; its dtype is the arithmetic's
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calib.checkpoint import Checkpoint
from ..calib.runner import BlockRunner
from ..calib.shards import read_header, read_tensor
from ..quant.errors import PlanishError
from .score import Report, arithmetic, final_hidden, next_log_probabilities

PROBE_FILE = Path("planish/probe.safetensors")
TOP = 8
_NAMES = ("input_ids", "next_logprobs", "top_ids", "top_logits", "last_hidden")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences that rounding alone explains. mean: of the log-probabilities of next tokens. highest: of any one of them, or of a top logit."""

    mean: float
    highest: float


# The reload runs the same operations on the same numbers in the same order, so on one machine with one number of threads it is bit-identical.
# Elsewhere sums are taken in another order; such a difference moves a few activations to the neighbouring code, and grows from block to block.
TOLERANCES = {torch.float32: Tolerance(mean=0.005, highest=0.5), torch.bfloat16: Tolerance(mean=0.05, highest=2.0)}


@dataclass(frozen=True, slots=True)
class ProbeDifference:
    """Reloaded against recorded: mean and largest absolute difference of next-token log-probabilities, and of the logits of the top tokens."""

    logprob_mean: float
    logprob_max: float
    logit_mean: float
    logit_max: float
    tokens: int
    dtype: torch.dtype

    @property
    def identical(self) -> bool:
        """Whether nothing differs by a single bit."""
        return self.logprob_max == 0 and self.logit_max == 0

    @property
    def tolerance(self) -> Tolerance:
        """What is allowed in this arithmetic."""
        return TOLERANCES[self.dtype]

    @property
    def ok(self) -> bool:
        """Whether rounding explains the differences. NaN does not pass."""
        limit = self.tolerance
        return self.logprob_mean <= limit.mean and self.logprob_max <= limit.highest and self.logit_max <= limit.highest

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {
            "logprob_mean": self.logprob_mean,
            "logprob_max": self.logprob_max,
            "logit_mean": self.logit_mean,
            "logit_max": self.logit_max,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "identical": self.identical,
        }


def record_probe(runner: BlockRunner, hidden_BLD: Tensor, ids_BL: Tensor) -> dict[str, Tensor]:
    """The probe's tensors, by their names in the file. hidden_BLD: after the last block, in the runner's dtype.

    Call it with no gradients and within the bfloat16_products of the walk that made hidden_BLD.
    """
    logprobs, ids, logits = [], [], []
    with runner.head() as head:
        for ids_L, hidden_LD in zip(ids_BL, hidden_BLD, strict=True):
            done = 0
            for logits_tV in head.logits(hidden_LD):
                next_t = ids_L[done + 1 : done + 1 + len(logits_tV)].to(logits_tV.device)
                logprobs.append(next_log_probabilities(logits_tV[: len(next_t)], next_t))
                top = logits_tV.topk(min(TOP, logits_tV.shape[1]), dim=1)
                logits.append(top.values)
                ids.append(top.indices.int())
                done += len(logits_tV)
    count, length = ids_BL.shape
    tensors = {
        "input_ids": ids_BL.long(),
        "next_logprobs": torch.cat(logprobs).view(count, length - 1),
        "top_ids": torch.cat(ids).view(count, length, -1),
        "top_logits": torch.cat(logits).view(count, length, -1),
        "last_hidden": hidden_BLD[:, -1].to(runner.dtype),
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_probe(folder: Path) -> dict[str, Tensor] | None:
    """The probe of a checkpoint folder, None if it has none. Errors: the file is broken or is no probe."""
    path = folder / PROBE_FILE
    if not path.is_file():
        return None
    header = read_header(path)
    if set(header) != set(_NAMES) or header["last_hidden"].dtype not in TOLERANCES:
        raise PlanishError(f"{path}: not a probe: it holds {', '.join(sorted(header))}. Compress again, or remove the file.")
    return {name: read_tensor(info) for name, info in header.items()}


def check_probe(checkpoint: Checkpoint, probe: Mapping[str, Tensor], *, device: torch.device | str = "cpu", report: Report | None = None) -> ProbeDifference:
    """Run the probe's tokens through a reloaded checkpoint, in the arithmetic that recorded it, and compare."""
    dtype = probe["last_hidden"].dtype
    ids = probe["input_ids"]
    with arithmetic(dtype, as_walked=True):
        runner = BlockRunner(checkpoint, dtype, torch.device(device))
        (hidden_BLD,) = final_hidden(runner, [ids], report)
        pieces = list(_differences(runner, hidden_BLD, probe))
    logprobs, logits = (torch.cat(column) for column in zip(*pieces, strict=True))
    return ProbeDifference(logprobs.mean().item(), logprobs.max().item(), logits.mean().item(), logits.max().item(), ids.numel(), dtype)


def _differences(runner: BlockRunner, hidden_BLD: Tensor, probe: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each window, the absolute differences of the next tokens' log-probabilities and of the logits of the tokens that were on top."""
    with runner.head() as head:
        for i, hidden_LD in enumerate(hidden_BLD):
            done = 0
            for logits_tV in head.logits(hidden_LD):
                piece = slice(done, done + len(logits_tV))
                logits_tV = logits_tV.cpu()
                next_t = probe["input_ids"][i, 1:][piece]
                logprobs_t = next_log_probabilities(logits_tV[: len(next_t)], next_t)
                top_tk = logits_tV.gather(1, probe["top_ids"][i, piece].long())
                yield (logprobs_t - probe["next_logprobs"][i, piece]).abs(), (top_tk - probe["top_logits"][i, piece]).abs().flatten()
                done += len(logits_tV)
