"""How well a model predicts a text, and how far a compressed one is from its base: both streamed, one block in memory at a time.

A window of L tokens gives L - 1 predictions; windows share no context. Perplexity is exp of the mean negative log-likelihood over all of them.

Shapes: ids (N, L) windows of token numbers; hidden (B, L, D) of B windows at once; logits (t, V) of t tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calib.files.checkpoint import Checkpoint
from ...calib.machine.precision import bfloat16_products
from ...calib.machine.workers import Workers, workers_for
from ...calib.walk.runner import BlockRunner, Head
from ...quant.errors import PlanishError

BATCH_TOKENS = 2048  # tokens that run through a block at a time

Report = Callable[[int, int], None]
"""report(done, total): so many steps (blocks, and heads) of all are done."""


def exponential(nll: float) -> float:
    """exp of it; infinite where that is more than a float holds, NaN where it is NaN."""
    return math.inf if nll >= 700 else math.exp(nll)


@dataclass(frozen=True, slots=True)
class Score:
    """A model on a text. nll: mean negative log-likelihood per token in nats. tokens: predictions made. windows: the mean of each window."""

    nll: float
    tokens: int
    windows: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(nll), see `exponential`."""
        return exponential(self.nll)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {"nll": self.nll, "perplexity": self.perplexity, "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Base and quantized model on the same predictions. kl: mean KL(base || quantized) per token in nats. agreement: share with one top token."""

    base: Score
    quantized: Score
    kl: float
    agreement: float

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {"base": self.base.to_dict(), "quantized": self.quantized.to_dict(), "kl": self.kl, "agreement": self.agreement}


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The distributions that others are held against: their logarithms, themselves (t, V), and the likeliest tokens (t,)."""

    log_tV: Tensor
    p_tV: Tensor
    top_t: Tensor

    @classmethod
    def of(cls, logits_tV: Tensor) -> "Reference":
        """Of the logits (t, V) of t tokens."""
        log_tV = log_probabilities(logits_tV)
        return cls(log_tV, log_tV.exp(), logits_tV.argmax(1))


@dataclass(slots=True)
class Divergence:
    """A running mean of KL(p || q) and of top-token agreement."""

    kl: float = 0.0
    same: int = 0
    tokens: int = 0

    def add(self, p_tV: Tensor, q_tV: Tensor) -> None:
        """Logits of both models for the same tokens."""
        self.add_to(Reference.of(p_tV), q_tV)

    def add_to(self, p: "Reference", q_tV: Tensor) -> None:
        """The same, for a p that several q are held against."""
        self.kl += (p.p_tV * (p.log_tV - log_probabilities(q_tV))).sum(1, dtype=torch.float64).sum().item()
        self.same += int((p.top_t == q_tV.argmax(1)).sum())
        self.tokens += len(q_tV)

    @property
    def mean_kl(self) -> float:
        """In nats per token."""
        return self.kl / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens."""
        return self.same / self.tokens


@dataclass(slots=True)
class _Tally:
    """Adds up the log-likelihoods of windows."""

    sums: list[float] = field(default_factory=list)
    predictions: int = 0

    def start(self, predictions: int) -> None:
        self.sums.append(0.0)
        self.predictions = predictions

    def add(self, logits_tV: Tensor, next_t: Tensor) -> None:
        self.sums[-1] -= next_log_probabilities(logits_tV, next_t).sum(dtype=torch.float64).item()

    def score(self) -> Score:
        tokens = self.predictions * len(self.sums)
        return Score(math.fsum(self.sums) / tokens, tokens, tuple(total / self.predictions for total in self.sums))


def log_probabilities(logits_tV: Tensor) -> Tensor:
    """log p of every token: (t, V).

    Not log_softmax: on CPUs its float32 sum over a large vocabulary loses small terms beside a likely token, and perplexity came out 8e-6 too low.
    """
    return logits_tV - logits_tV.logsumexp(1, keepdim=True)


def next_log_probabilities(logits_tV: Tensor, next_t: Tensor) -> Tensor:
    """log p of each token that really follows: (t,). As exact as `log_probabilities`."""
    return logits_tV.gather(1, next_t[:, None])[:, 0] - logits_tV.logsumexp(1)


@contextmanager
def arithmetic(dtype: torch.dtype, *, as_walked: bool = False) -> Iterator[None]:
    """No gradients, and float32 products exact; or, as_walked, as the compression's walk computes them when it works in bfloat16."""
    with torch.no_grad(), bfloat16_products(as_walked and dtype is torch.bfloat16):
        yield


def final_hidden(
    runner: BlockRunner,
    batches: list[Tensor],
    report: Report | None = None,
    disturb: Callable[[Tensor], Tensor] | None = None,
    each: int | None = None,
) -> list[Tensor]:
    """The hidden states after the last block for each batch of ids. Call inside `arithmetic`.

    disturb: applied to what every block gives out. each: threads with which torch works on a batch, None: an equal share of those there are.
    """
    count = runner.topology.block_count
    started = list(runner.start(batches))
    hidden, calls = [first for first, _ in started], [call for _, call in started]
    del started

    def move(batch: int) -> None:
        out = calls[batch].run(block, index, hidden[batch])
        hidden[batch] = out if disturb is None else disturb(out)

    with Workers(workers_for(len(batches), runner.device), each) as workers:
        for index in range(count):
            block = runner.load_block(index)
            list(workers.map(move, range(len(batches))))
            runner.release_block(index)
            if report is not None:
                report(index + 1, count)
    return hidden


def last_bits(hidden: Tensor) -> Tensor:
    """Up to half a unit in the last place added at random and rounded: about what another order of summation does in a block.

    As `disturb` of final_hidden it shows how far two correct evaluations of one model may be apart.
    """
    noise = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device) - 0.5
    return (hidden * (1 + torch.finfo(hidden.dtype).eps * noise)).to(hidden.dtype)


def window_batches(ids_NL: Tensor) -> list[Tensor]:
    """Windows in batches of about BATCH_TOKENS tokens."""
    if ids_NL.dim() != 2 or ids_NL.shape[0] < 1 or ids_NL.shape[1] < 2:
        raise PlanishError(f"evaluation text has the shape {tuple(ids_NL.shape)}. Give at least one window of at least 2 tokens.")
    return list(torch.split(ids_NL, max(1, BATCH_TOKENS // ids_NL.shape[1])))


def score(
    checkpoint: Checkpoint,
    ids_NL: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Report | None = None,
) -> Score:
    """The model's mean log-likelihood of windows of text, computed in `dtype`; the softmax is always in float32.

    Equivalent to cross_entropy(model(ids).logits[:, :-1], ids[:, 1:]). Works on full-precision and stored compressed checkpoints alike.
    Memory: one block or the head, the hidden states of all windows, and the logits of 256 tokens.
    """
    batches = window_batches(ids_NL)
    with arithmetic(dtype):
        runner = BlockRunner(checkpoint, dtype, torch.device(device))
        hidden = final_hidden(runner, batches, _shifted(progress, 0, runner.topology.block_count + 1))
        (score,) = hidden_scores(runner, batches, [hidden])
    if progress is not None:
        progress(runner.topology.block_count + 1, runner.topology.block_count + 1)
    return score


def hidden_scores(runner: BlockRunner, batches: Sequence[Tensor], streams: Iterable[Iterable[Tensor]]) -> list[Score]:
    """The score of each stream: hidden states (B, L, D) after the last block, for each batch of ids. Call inside `arithmetic`."""
    scores: list[Score] = []
    with runner.head() as head:
        for stream in streams:
            tally = _Tally()
            for ids_L, hidden_LD in _windows(batches, stream):
                tally.start(len(ids_L) - 1)
                for (logits,), next_t in _side_by_side([(head, hidden_LD)], ids_L):
                    tally.add(logits, next_t)
            scores.append(tally.score())
    return scores


def compare(
    base: Checkpoint,
    quantized: Checkpoint,
    ids_NL: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Report | None = None,
) -> Comparison:
    """Both models' scores and their divergence. Blocks run one at a time, the base model's first; both heads are in memory at the end.

    Errors: the models have different vocabularies.
    """
    check_vocabularies(base, quantized)
    batches = window_batches(ids_NL)
    with arithmetic(dtype):
        one, two = (BlockRunner(checkpoint, dtype, torch.device(device)) for checkpoint in (base, quantized))
        total = one.topology.block_count + two.topology.block_count + 1
        first = final_hidden(one, batches, _shifted(progress, 0, total))
        second = final_hidden(two, batches, _shifted(progress, one.topology.block_count, total))
        (found,) = hidden_comparisons(one, two, [(batches, first, second)])
    if progress is not None:
        progress(total, total)
    return found


def check_vocabularies(base: Checkpoint, quantized: Checkpoint) -> None:
    """PlanishError if the models have different vocabularies."""
    one, other = (checkpoint.config.get_text_config().vocab_size for checkpoint in (quantized, base))
    if one != other:
        raise PlanishError(
            f"{quantized.path} has a vocabulary of {one} and {base.path} one of {other}: "
            "one is not made from the other. Give the model that was compressed."
        )


def hidden_comparisons(
    one: BlockRunner, two: BlockRunner, texts: Iterable[tuple[Sequence[Tensor], Iterable[Tensor], Iterable[Tensor]]]
) -> list[Comparison]:
    """The comparison on each text, given as batches of ids and, for each batch, the hidden states (B, L, D) that each model ends in.

    Call inside `arithmetic`.
    """
    found: list[Comparison] = []
    with one.head() as head_one, two.head() as head_two:
        for batches, first, second in texts:
            found += _comparisons(head_one, head_two, batches, first, [second])
    return found


def stream_comparisons(
    one: BlockRunner,
    two: BlockRunner,
    batches: Sequence[Tensor],
    first: Iterable[Tensor],
    others: Sequence[Sequence[Tensor]],
    report: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """The comparison of each of several streams of the second model with the same one of the first. Call inside `arithmetic`.

    A stream: for each batch of ids the hidden states (B, L, D) that the model ends in. The logits of one piece of each are in memory at a time.
    report: told how many predictions are done.
    """
    with one.head() as head_one, two.head() as head_two:
        return _comparisons(head_one, head_two, batches, first, others, report)


def _comparisons(
    one: Head,
    two: Head,
    batches: Sequence[Tensor],
    first: Iterable[Tensor],
    others: Sequence[Iterable[Tensor]],
    report: Callable[[int], None] | None = None,
) -> list[Comparison]:
    done = 0
    base, tallies, divergences = _Tally(), [_Tally() for _ in others], [Divergence() for _ in others]
    for (ids_L, p_LD), *rest in zip(_windows(batches, first), *(_windows(batches, other) for other in others), strict=True):
        for tally in (base, *tallies):
            tally.start(len(ids_L) - 1)
        pieces = [two.logits(q_LD[:-1]) for _, q_LD in rest]
        for (p_tV,), next_t in _side_by_side([(one, p_LD)], ids_L):
            base.add(p_tV, next_t)
            reference = Reference.of(p_tV)
            done += len(p_tV)
            for tally, divergence, piece in zip(tallies, divergences, pieces, strict=True):
                q_tV = next(piece)
                tally.add(q_tV, next_t)
                divergence.add_to(reference, q_tV)
            if report is not None:
                report(done)
    score = base.score()
    return [Comparison(score, tally.score(), diverged.mean_kl, diverged.agreement) for tally, diverged in zip(tallies, divergences, strict=True)]


def _shifted(report: Report | None, before: int, total: int) -> Report | None:
    return None if report is None else lambda done, _all: report(before + done, total)


def _windows(batches: Iterable[Tensor], hidden: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window's ids (L,) and hidden states (L, D)."""
    for ids_BL, hidden_BLD in zip(batches, hidden, strict=True):
        yield from zip(ids_BL, hidden_BLD, strict=True)


def _side_by_side(heads: list[tuple[Head, Tensor]], ids_L: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Pieces of one window: the logits (t, V) of every head, and the tokens (t,) that follow."""
    done = 0
    for logits in zip(*(head.logits(hidden_LD[:-1]) for head, hidden_LD in heads), strict=True):
        count = len(logits[0])
        yield logits, ids_L[1 + done : 1 + done + count].to(logits[0].device)
        done += count
