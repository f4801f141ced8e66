"""The served model is scored: a running server says how likely each token of the windows is, from token numbers, so that nothing is tokenized anew.

vLLM's `prompt_logprobs` gives for each token of the prompt its log-probability and the likeliest token; where a server lacks that, `echo` with
`logprobs` gives the first, and the likeliest only as text, which does not say which token it is. No server gives the whole distribution, so KL
divergence cannot be measured through one.

Shapes: ids (N, L) windows of token numbers; P = L - 1 predictions of each.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calib.checkpoint import Checkpoint
from ..calib.runner import BlockRunner
from ..quant.errors import PlanishError
from .client import Refused, Server
from .score import Report, Score, arithmetic, final_hidden, next_log_probabilities, window_batches

NO_KL = "a server tells only the likeliest tokens, not the whole distribution that a KL divergence is computed from"
NO_TOPS = "this server names no likeliest token by its number (vLLM's prompt_logprobs does)"


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What a model says of every token that follows. logprobs_NP: in nats, float64; tops_NP: the likeliest token instead, None: not known."""

    logprobs_NP: Tensor
    tops_NP: Tensor | None

    @property
    def score(self) -> Score:
        """Over all windows."""
        nll_N = -self.logprobs_NP.mean(1)
        return Score(math.fsum(nll_N.tolist()) / len(nll_N), self.logprobs_NP.numel(), tuple(nll_N.tolist()))


def own_scores(
    checkpoint: Checkpoint, ids_NL: Tensor, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", report: Report | None = None
) -> TokenScores:
    """What planish computes, one block in memory at a time; score.score with every token for itself."""
    batches = window_batches(ids_NL)
    logprobs, tops = [], []
    with arithmetic(dtype):
        runner = BlockRunner(checkpoint, dtype, torch.device(device))
        hidden = final_hidden(runner, batches, report)
        with runner.head() as head:
            for ids_L, hidden_LD in ((ids, out) for batch, outs in zip(batches, hidden, strict=True) for ids, out in zip(batch, outs, strict=True)):
                next_t, done = ids_L[1:], 0
                for logits_tV in head.logits(hidden_LD[:-1]):
                    following = next_t[done : done + len(logits_tV)].to(logits_tV.device)
                    logprobs.append(next_log_probabilities(logits_tV, following).double().cpu())
                    tops.append(logits_tV.argmax(1).cpu())
                    done += len(logits_tV)
    shape = (ids_NL.shape[0], ids_NL.shape[1] - 1)
    return TokenScores(torch.cat(logprobs).reshape(shape), torch.cat(tops).reshape(shape))


def served_scores(server: Server, ids_NL: Tensor, report: Report | None = None) -> TokenScores:
    """What the server says, one window after the other. report(done, total): windows.

    Raises PlanishError: windows too long for the server's context (one token must be left for an answer), no log-probabilities of the prompt,
    or an answer about other tokens.
    """
    window_batches(ids_NL)
    _check_context(server, ids_NL.shape[1])
    logprobs, tops = [], []
    for done, ids in enumerate(ids_NL.tolist()):
        likely, likeliest = _window(server, ids)
        logprobs.append(likely)
        tops.append(likeliest)
        if report is not None:
            report(done + 1, len(ids_NL))
    known = [top for top in tops if top is not None]
    return TokenScores(torch.tensor(logprobs, dtype=torch.float64), torch.tensor(known) if len(known) == len(tops) else None)


def _check_context(server: Server, length: int) -> None:
    if server.context is not None and length + 1 > server.context:
        raise PlanishError(
            f"{server.words}: windows of {length} tokens and one for the answer need a context of {length + 1}, but the server has {server.context}. "
            f"Give a length of at most {server.context - 1}, or restart the server with --max-model-len {length + 1}."
        )


def agreement(base: TokenScores, served: TokenScores) -> float | None:
    """The share of predictions at which both have the same likeliest token; None where one does not say."""
    if base.tops_NP is None or served.tops_NP is None:
        return None
    return (base.tops_NP == served.tops_NP).double().mean().item()


def _window(server: Server, ids: list[int]) -> tuple[list[float], list[int] | None]:
    """Log-probabilities of all tokens but the first, and the likeliest ones, where the server names them."""
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
    values = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(values) < len(ids) or any(value is None for value in values[1 : len(ids)]):
        raise PlanishError(
            f"{server.words}: gives no log-probabilities of a prompt's tokens, neither with prompt_logprobs nor with echo. "
            "Use a server that does, such as vLLM, or evaluate without one."
        )
    return [float(value) for value in values[1 : len(ids)]], None


def _choice(server: Server, answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices[0], dict):
        raise PlanishError(f"{server.words}: the answer to /v1/completions has no choices. It is no OpenAI-compatible server, or a broken one.")
    found: dict[str, Any] = choices[0]
    return found


def _by_number(server: Server, ids: list[int], entries: list[dict[str, dict[str, Any]] | None]) -> tuple[list[float], list[int]]:
    """Of vLLM's prompt_logprobs: for each token but the first a mapping of token numbers, as text, to logprob and rank."""
    logprobs, tops = [], []
    for token, entry in zip(ids[1:], entries[1:], strict=False):
        if entry is None or str(token) not in entry:
            break
        logprobs.append(float(entry[str(token)]["logprob"]))
        # of equal ones the first in rank is what the server would have taken
        tops.append(int(min(entry, key=lambda number: (entry[number].get("rank") or math.inf, -entry[number]["logprob"]))))
    if len(logprobs) != len(ids) - 1:
        raise PlanishError(f"{server.words}: log-probabilities are not those of the tokens sent (of {len(ids) - 1}, {len(logprobs)} fit).")
    return logprobs, tops
