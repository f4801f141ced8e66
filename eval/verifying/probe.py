"""The probe: what the quantized model in memory said of a few tokens, kept in the checkpoint, so that a reload can be held against it.

The reload runs the same operations on the same numbers in the same order, so where hardware and libraries are the same it is bit-identical.
Elsewhere sums are taken in another order, and with quantized activations the last bit of a number matters: it moves some codes to their neighbours,
and from block to block that grows to the size of the quantization's own noise (with int8 activations, whichever bit it was: 0.06 nats a token in a
model of 30 blocks). So how much rounding explains is no constant: it is measured on the model itself, by disturbing the last bits on purpose.

OUT/planish/probe.safetensors (B windows of L tokens, k = 8):
    input_ids         (B, L) int64
    next_logprobs     (B, L - 1) float32   log-probability of each token that follows
    top_ids           (B, L, k) int32      the k likeliest next tokens, likeliest first
    top_logits        (B, L, k) float32    and their logits
    last_hidden       (B, D)               hidden states of each window's last token after the last block; its dtype is the arithmetic's
    threads           () int64             with how many threads the blocks were computed; a reload takes as many where it has them
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...calib.files.checkpoint import Checkpoint
from ...calib.files.shards import read_header, read_tensor
from ...calib.walk.runner import BlockRunner
from ...quant.errors import PlanishError
from ..scores.check import Figure
from ..scores.score import Report, arithmetic, final_hidden, last_bits, next_log_probabilities

PROBE_FILE = Path("planish/probe.safetensors")
TOP = 8
_NAMES = ("input_ids", "next_logprobs", "top_ids", "top_logits", "last_hidden", "threads")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two answers: mean and largest absolute difference of next-token log-probabilities, and the largest of the top tokens' logits."""

    logprob_mean: float
    logprob_max: float
    logit_max: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest allowed differences. mean: of the log-probabilities of next tokens. highest: of any one of them."""

    mean: float
    highest: float


@dataclass(frozen=True, slots=True)
class ProbeDifference:
    """Reloaded against recorded. rounding: what rounding alone does to this model's answers; None if it was not needed, as nothing differs."""

    found: Difference
    rounding: Difference | None
    tokens: int
    dtype: torch.dtype

    @property
    def logprob_mean(self) -> float:
        """Mean absolute difference of the log-probabilities of next tokens."""
        return self.found.logprob_mean

    @property
    def identical(self) -> bool:
        """Whether nothing differs by a single bit."""
        return self.found.logprob_max == 0 and self.found.logit_max == 0

    @property
    def tolerance(self) -> Tolerance:
        """Twice what rounding does to the mean, and three times to a single token (a maximum varies more), and 1e-4 for what is below both."""
        if self.rounding is None:
            return Tolerance(0.0, 0.0)
        return Tolerance(2 * self.rounding.logprob_mean + 1e-4, 3 * self.rounding.logprob_max + 1e-4)

    @property
    def ok(self) -> bool:
        """Whether rounding explains the differences. NaN does not pass."""
        return self.found.logprob_mean <= self.tolerance.mean and self.found.logprob_max <= self.tolerance.highest

    def to_dict(self) -> dict[str, Figure]:
        """As plain values, for JSON."""
        return {
            **asdict(self.found),
            "tolerance_mean": self.tolerance.mean,
            "tolerance_max": self.tolerance.highest,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "identical": self.identical,
        }


def record_probe(runner: BlockRunner, hidden_BLD: Tensor, ids_BL: Tensor, threads: int) -> dict[str, Tensor]:
    """The probe's tensors, by their names in the file. hidden_BLD: after the last block, in the runner's dtype, computed with so many threads.

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
        "threads": torch.tensor(threads),
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_probe(folder: Path) -> dict[str, Tensor] | None:
    """The probe of a checkpoint folder, None if it has none. Errors: the file is broken or is no probe."""
    path = folder / PROBE_FILE
    if not path.is_file():
        return None
    header = read_header(path)
    if set(header) != set(_NAMES) or header["last_hidden"].dtype not in _DTYPES:
        raise PlanishError(f"{path}: not a probe: it holds {', '.join(sorted(header))}. Compress again, or remove the file.")
    return {name: read_tensor(info) for name, info in header.items()}


def check_probe(
    checkpoint: Checkpoint, probe: Mapping[str, Tensor], *, device: torch.device | str = "cpu", report: Report | None = None
) -> ProbeDifference:
    """Run the probe's tokens through a reloaded checkpoint, in the arithmetic that recorded it, and compare."""
    dtype, ids = probe["last_hidden"].dtype, probe["input_ids"]
    with arithmetic(dtype, as_walked=True):
        runner = BlockRunner(checkpoint, dtype, torch.device(device))
        answer = _answer(runner, probe, report, None)
        found = _difference(answer, (probe["next_logprobs"], probe["top_logits"]))
        rounding = None
        if found.logprob_max != 0 or found.logit_max != 0:
            rounding = _difference(answer, _answer(runner, probe, report, last_bits))
    return ProbeDifference(found, rounding, ids.numel(), dtype)


def _answer(
    runner: BlockRunner, probe: Mapping[str, Tensor], report: Report | None, disturb: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the next tokens (B, L - 1), and logits of the recorded top tokens (B, L, k)."""
    ids_BL, top_BLk = probe["input_ids"], probe["top_ids"]
    each = min(int(probe["threads"]), torch.get_num_threads())
    (hidden_BLD,) = final_hidden(runner, [ids_BL], report, disturb, each)
    logprobs, logits = [], []
    with runner.head() as head:
        for ids_L, top_Lk, hidden_LD in zip(ids_BL, top_BLk, hidden_BLD, strict=True):
            done = 0
            for logits_tV in head.logits(hidden_LD):
                piece = slice(done, done + len(logits_tV))
                next_t = ids_L[1:][piece].to(logits_tV.device)
                logprobs.append(next_log_probabilities(logits_tV[: len(next_t)], next_t).cpu())
                logits.append(logits_tV.gather(1, top_Lk[piece].long().to(logits_tV.device)).cpu())
                done += len(logits_tV)
    return torch.cat(logprobs).view(len(ids_BL), -1), torch.cat(logits).view(top_BLk.shape)


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Difference:
    logprobs, logits = ((a - b).abs() for a, b in zip(one, other, strict=True))
    return Difference(logprobs.mean().item(), logprobs.max().item(), logits.max().item())
