"""Perplexity of a text, and divergence from the base model on it, with overlapping windows where they are asked for; one block in memory at a time.

A window of L tokens is run alone (behind the model's own prefix, if it has one). Windows begin `stride` tokens of text apart; each scores the tokens
that no window before it has: all but its first, or its last `stride` ones. With stride = L none overlap, and the first token of each is never scored;
tables in papers mostly have that. With a smaller stride every token has at least L - stride tokens before it, and perplexity is lower.

With bos = window each window is the tokenizer's token for a beginning and L - 1 tokens of text, and no token of the text goes without a score.

Shapes: ids (N, L) windows of token numbers; hidden (N, L, D) what the last block gives; logits (t, V) of t tokens.
"""

import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calib.data.windows import tokens
from ...calib.files.checkpoint import Checkpoint
from ...calib.walk.runner import BlockRunner, Head
from ...quant.errors import PlanishError
from .evaluation import Bos, TextBase, TextResult
from .paired import Measured, ratio
from .score import Divergence, Report, arithmetic, check_vocabularies, exponential, final_hidden, next_log_probabilities, window_batches

SPARE = 64  # tokens read beyond those that are used: the last one may end where reading did, amid a word


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """How a text is measured. source: as of `planish verify --text`. windows, length: at most so many, of so many tokens. stride: tokens of text from
    one window's beginning to the next one's; None: windows do not overlap. bos: see the module."""

    source: str = "builtin"
    windows: int = 4
    length: int = 2048
    stride: int | None = None
    bos: Bos = "none"

    def __post_init__(self) -> None:
        for name, value, least in (("windows", self.windows, 1), ("length", self.length, 2), ("stride", self.stride, 1)):
            if value is not None and value < least:
                raise PlanishError(f"{name} is {value}, but must be at least {least}.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Windows:
    """A text cut into windows. ids (N, L). stride: in tokens of text."""

    ids: Tensor
    stride: int
    settings: TextSettings

    def first(self, window: int) -> int:
        """The first position of that window whose token is scored: 1 at least."""
        return max(1, self.ids.shape[1] - self.stride) if window else 1

    def counts(self) -> list[int]:
        """Predictions scored in each window."""
        return [self.ids.shape[1] - self.first(window) for window in range(len(self.ids))]

    def sha256(self) -> str:
        """Of the token numbers, as 64-bit integers."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def cut(checkpoint: Checkpoint, settings: TextSettings) -> Windows:
    """The windows of a text for this model: fewer than asked for where the text is short, shorter where the model is.

    Raises PlanishError: the text holds not one window; a stride that leaves tokens out; no token for a beginning where one is needed.
    """
    tokenizer = checkpoint.tokenizer()
    length = min(settings.length, getattr(checkpoint.config.get_text_config(), "max_position_embeddings", settings.length))
    bos = [tokenizer.bos_token_id] if settings.bos == "window" else []
    if bos == [None]:
        raise PlanishError("bos is window, but the model's tokenizer has no token for a beginning. Give none.")
    body = length - len(bos)
    stride = body if settings.stride is None else settings.stride
    if stride > body:
        raise PlanishError(f"stride is {stride}, but a window has {body} tokens of text, so that tokens would be left out. Give at most {body}.")
    text_T = _stream(checkpoint, settings.source, (settings.windows - 1) * stride + body + len(bos))
    if bos and len(text_T) and int(text_T[0]) == bos[0]:
        text_T = text_T[1:]
    if len(text_T) < body:
        raise PlanishError(f"--text {settings.source} holds {len(text_T)} tokens, not one window of {body}. Lower --length, or give a larger text.")
    body_Nb = text_T.unfold(0, body, stride)[: settings.windows]
    start_N1 = torch.tensor([bos] * len(body_Nb), dtype=torch.int64).reshape(len(body_Nb), len(bos))
    return Windows(ids=torch.cat([start_N1, body_Nb], 1), stride=stride, settings=settings)


def _stream(checkpoint: Checkpoint, source: str, count: int) -> Tensor:
    """The first tokens of the text: (T,) with T = count, or all of a shorter text."""
    tokenizer = checkpoint.tokenizer()
    try:
        return tokens(source, tokenizer, samples=count + SPARE, length=1, part="evaluation")[:count, 0]
    except PlanishError:  # the text is short, so all of it is not much; if it is bad, this says so again
        return tokens(source, tokenizer, samples=None, length=1, part="evaluation")[:count, 0]


@dataclass(frozen=True, slots=True, eq=False)
class BaseHidden:
    """The base model, and the hidden states (N, L, D) that it ends in on the windows."""

    checkpoint: Checkpoint
    hidden: Tensor


def hidden_states(checkpoint: Checkpoint, text: Windows, *, dtype: torch.dtype, device: torch.device, report: Report | None = None) -> Tensor:
    """What the model's last block gives for the windows, on the CPU: (N, L, D)."""
    with arithmetic(dtype):
        found = final_hidden(BlockRunner(checkpoint, dtype, device), window_batches(text.ids), report)
    return torch.cat([hidden.cpu() for hidden in found])


@dataclass(slots=True)
class Sums:
    """Of each window: negative log-likelihoods of both models, divergences, agreeing tokens; empty where not measured."""

    nll: list[float] = field(default_factory=list)
    base_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


def measure_text(
    checkpoint: Checkpoint, text: Windows, base: BaseHidden | None, *, dtype: torch.dtype, device: torch.device, report: Report | None = None
) -> TextResult:
    """Run the model over the windows, and hold it against the base model if there is one. Softmax and sums are in float32 and float64.

    Without overlap and bos the same figures as score.compare. Errors: the models have different vocabularies; a model whose logits are NaN.
    """
    if base is not None:
        check_vocabularies(base.checkpoint, checkpoint)
    hidden_NLD = hidden_states(checkpoint, text, dtype=dtype, device=device, report=report)
    with arithmetic(dtype):
        sums = _sums(checkpoint, text, hidden_NLD, base, dtype, device)
    _check_numbers(checkpoint, sums.nll)
    if base is not None:
        _check_numbers(base.checkpoint, sums.base_nll)
    return text_result(text, sums, str(dtype).removeprefix("torch."), {})


def _check_numbers(checkpoint: Checkpoint, nll: list[float]) -> None:
    """PlanishError if a window's likelihood is no number."""
    if any(map(math.isnan, nll)):
        raise PlanishError(
            f"{checkpoint.path}: logits are not finite (NaN) on this text: the weights or scales are broken, or too large for the arithmetic. "
            "`planish verify` says which tensors of a compressed checkpoint are broken; compress again, or give another --dtype."
        )


def text_result(text: Windows, sums: Sums, dtype: str, missing: Mapping[str, str]) -> TextResult:
    """What the sums come to. missing: figures that were not measured, and why."""
    settings, counts = text.settings, [float(count) for count in text.counts()]
    return TextResult(
        source=settings.source,
        sha256=text.sha256(),
        windows=text.ids.shape[0],
        length=text.ids.shape[1],
        stride=text.stride,
        bos=settings.bos,
        tokens=sum(text.counts()),
        dtype=dtype,
        perplexity=_exp(_ratio(sums.nll, counts)),
        base=_against(sums, counts) if sums.base_nll else None,
        missing=missing,
    )


def _against(sums: Sums, counts: list[float]) -> TextBase:
    worse = [after - before for after, before in zip(sums.nll, sums.base_nll, strict=True)]
    return TextBase(
        perplexity=_exp(_ratio(sums.base_nll, counts)).value,
        ratio=_exp(_ratio(worse, counts)),
        kl=_ratio(sums.kl, counts) if sums.kl else None,
        agreement=_ratio(sums.same, counts) if sums.same else None,
    )


def _ratio(sums: list[float], counts: list[float]) -> Measured:
    found = ratio(sums, counts)
    assert found is not None  # a window has at least one prediction
    return found


def _exp(figure: Measured) -> Measured:
    """exp of it, with the error to first order."""
    value = exponential(figure.value)
    return Measured(value=value, error=None if figure.error is None else value * figure.error)


def _sums(checkpoint: Checkpoint, text: Windows, hidden_NLD: Tensor, base: BaseHidden | None, dtype: torch.dtype, device: torch.device) -> Sums:
    """Both heads are in memory together."""
    sums = Sums()
    with ExitStack() as stack:
        heads = [(stack.enter_context(BlockRunner(checkpoint, dtype, device).head()), hidden_NLD)]
        if base is not None:
            heads.append((stack.enter_context(BlockRunner(base.checkpoint, dtype, device).head()), base.hidden))
        for window, ids_L in enumerate(text.ids):
            first = text.first(window)
            _add(sums, [(head, hidden[window, first - 1 : -1].to(device)) for head, hidden in heads], ids_L[first:].to(device))
    return sums


def _add(sums: Sums, sides: list[tuple[Head, Tensor]], next_t: Tensor) -> None:
    """One window: sides hold hidden states (t, D) of the compressed model and, if there is one, of the base; next_t the tokens that follow."""
    nll, divergence, done = [0.0 for _ in sides], Divergence(), 0
    for logits in zip(*(head.logits(hidden_tD) for head, hidden_tD in sides), strict=True):
        following = next_t[done : done + len(logits[0])]
        for side, logits_tV in enumerate(logits):
            nll[side] -= next_log_probabilities(logits_tV, following).sum(dtype=torch.float64).item()
        if len(logits) > 1:
            divergence.add(logits[1], logits[0])
        done += len(following)
    sums.nll.append(nll[0])
    if len(sides) > 1:
        sums.base_nll.append(nll[1])
        sums.kl.append(divergence.kl)
        sums.same.append(float(divergence.same))
