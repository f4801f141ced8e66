"""The served model is scored: a running server says how likely each token of the windows is, from token numbers, so that nothing is tokenized anew.

vLLM's `prompt_logprobs` gives for each token of the prompt its log-probability and the likeliest token; where a server lacks that, `echo` with
`logprobs` gives the first, and the likeliest only as text, which does not say which token it is. No server gives the whole distribution, so KL
divergence cannot be measured through one.

Shapes: ids (N, L) windows of token numbers; P = L - 1 predictions of each; hidden (N, L, D) of the base model; logits (t, V) of t tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calib.walk.runner import BlockRunner
from ...quant.errors import PlanishError
from ..scores.evaluation import TextResult
from ..scores.score import Report, arithmetic, next_log_probabilities, window_batches
from ..scores.text_score import BaseHidden, Sums, Windows, text_result
from .client import Refused, Server

NO_KL = "a server tells the likeliest tokens, not the whole distribution that a KL divergence is made of"
NO_TOPS = "this server names no likeliest token by its number, as vLLM does with prompt_logprobs"


@dataclass(frozen=True, slots=True)
class Said:
    """Of each token of a prompt but the first: its log-probability in nats, whether it is the likeliest; tops: the likeliest one's number, None: not
    told."""

    logprobs: list[float]
    greedy: list[bool]
    tops: list[int] | None


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Of every prediction: logprobs_NP in nats, float64; tops_NP: the likeliest token, None: not known."""

    logprobs_NP: Tensor
    tops_NP: Tensor | None


def served_scores(server: Server, ids_NL: Tensor, report: Report | None = None) -> TokenScores:
    """What the server says, one window after the other. report(done, total): windows.

    Raises PlanishError: windows too long for the server's context (one token must be left for an answer), no log-probabilities of the prompt,
    or an answer about other tokens.
    """
    window_batches(ids_NL)
    check_context(server, ids_NL.shape[1])
    windows = []
    for ids in ids_NL.tolist():
        windows.append(said_of(server, ids))
        if report is not None:
            report(len(windows), len(ids_NL))
    tops = [said.tops for said in windows if said.tops is not None]
    logprobs_NP = torch.tensor([said.logprobs for said in windows], dtype=torch.float64)
    return TokenScores(logprobs_NP, torch.tensor(tops) if len(tops) == len(windows) else None)


def check_context(server: Server, length: int) -> None:
    """PlanishError if windows of so many tokens are too long for the server."""
    if server.context is not None and length + 1 > server.context:
        raise PlanishError(
            f"{server.words}: windows of {length} tokens and one for the answer need a context of {length + 1}, but the server has {server.context}. "
            f"Give a length of at most {server.context - 1}, or restart the server with --max-model-len {length + 1}."
        )


def measure_served(
    server: Server, text: Windows, base: BaseHidden | None, *, dtype: torch.dtype, device: torch.device, report: Report | None = None
) -> TextResult:
    """text_score.measure_text of a server's model. dtype, device: where the base model's head runs. Errors as of served_scores."""
    scores, sums = served_scores(server, text.ids, report), Sums()
    for window, logprobs_P in enumerate(scores.logprobs_NP):
        sums.nll.append(-logprobs_P[text.first(window) - 1 :].sum().item())
    missing = {}
    if base is not None:
        with arithmetic(dtype):
            _add_base(sums, scores, text, base, dtype, device)
        missing = {"kl": NO_KL, **({} if scores.tops_NP is not None else {"agreement": NO_TOPS})}
    return text_result(text, sums, "the server's" + ("" if base is None else f", base model {str(dtype).removeprefix('torch.')}"), missing)


def _add_base(sums: Sums, scores: TokenScores, text: Windows, base: BaseHidden, dtype: torch.dtype, device: torch.device) -> None:
    with BlockRunner(base.checkpoint, dtype, device).head() as head:
        for window, ids_L in enumerate(text.ids):
            start, nll, same = text.first(window), 0.0, 0
            done = start - 1  # predictions, of which number i is about token i + 1
            for logits_tV in head.logits(base.hidden[window, start - 1 : -1].to(device)):
                count = len(logits_tV)
                nll -= next_log_probabilities(logits_tV, ids_L[done + 1 : done + 1 + count].to(device)).sum(dtype=torch.float64).item()
                if scores.tops_NP is not None:
                    same += int((logits_tV.argmax(1).cpu() == scores.tops_NP[window, done : done + count]).sum())
                done += count
            sums.base_nll.append(nll)
            if scores.tops_NP is not None:
                sums.same.append(float(same))


def said_of(server: Server, ids: list[int]) -> Said:
    """What the server says of a prompt's tokens. Raises PlanishError: it says nothing of them, or something about others."""
    asked = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0}
    try:
        choice = _choice(server, server.client.post("/v1/completions", {**asked, "prompt_logprobs": 1}))
    except Refused as error:
        if error.status not in (400, 422):  # other servers refuse what they do not know
            raise
        choice = {}
    if choice.get("prompt_logprobs"):
        return _by_number(server, ids, choice["prompt_logprobs"])
    choice = _choice(server, server.client.post("/v1/completions", {**asked, "echo": True, "logprobs": 1}))
    said = choice.get("logprobs") or {}
    values, tops = ((said.get(name) or [])[1 : len(ids)] for name in ("token_logprobs", "top_logprobs"))
    if not len(values) == len(tops) == len(ids) - 1 or None in values or None in tops:
        raise PlanishError(
            f"{server.words}: gives no log-probabilities of a prompt's tokens, neither with prompt_logprobs nor with echo. "
            "Use a server that does, such as vLLM, or evaluate without one."
        )
    return Said([_number(server, value) for value in values], [value >= max(top.values()) for value, top in zip(values, tops, strict=True)], None)


def generate(server: Server, ids: list[int], settings: dict[str, Any]) -> str:
    """The text that the server goes on with. settings: of /v1/completions."""
    choice = _choice(server, server.client.post("/v1/completions", {"model": server.model, "prompt": ids, **settings}))
    return str(choice.get("text", ""))


def _choice(server: Server, answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices[0], dict):
        raise PlanishError(f"{server.words}: the answer to /v1/completions has no choices. It is no OpenAI-compatible server, or a broken one.")
    found: dict[str, Any] = choices[0]
    return found


def _by_number(server: Server, ids: list[int], entries: list[dict[str, dict[str, Any]] | None]) -> Said:
    """Of vLLM's prompt_logprobs: for each token but the first a mapping of token numbers, as text, to logprob and rank."""
    logprobs: list[float] = []
    tops: list[int] = []
    for token, entry in zip(ids[1:], entries[1:], strict=False):
        if entry is None or str(token) not in entry:
            break
        logprobs.append(_number(server, entry[str(token)].get("logprob")))
        tops.append(int(min(entry.items(), key=lambda item: _order(item[1]))[0]))
    if len(logprobs) != len(ids) - 1:
        raise PlanishError(f"{server.words}: log-probabilities are not those of the tokens sent (of {len(ids) - 1}, {len(logprobs)} fit).")
    return Said(logprobs, [token == top for token, top in zip(ids[1:], tops, strict=True)], tops)


def _number(server: Server, logprob: object) -> float:
    """A log-probability. PlanishError: it is none, as where the served model's logits are NaN."""
    if not isinstance(logprob, int | float) or math.isnan(logprob):
        found = "NaN" if isinstance(logprob, float) else repr(logprob)
        raise PlanishError(
            f"{server.words}: a log-probability is {found}, so the model as it runs there is broken. `planish verify` says whether the checkpoint "
            "is; if it is not, restart the server with another --dtype."
        )
    return float(logprob)


def _order(entry: dict[str, Any]) -> tuple[float, float]:
    """By rank, for of equally likely tokens the first in rank is what the server would have taken."""
    return entry.get("rank") or math.inf, -(entry.get("logprob") or 0.0)
