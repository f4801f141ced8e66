"""A model in memory, as lm-evaluation-harness runs one, and a task's answers. Imports that library, the extra planish[eval]: import it late.

All that decides a number is the library's: requests, their tokens, batches by length, the sums of log-probabilities. So a model that transformers
loads too gets the very numbers of `lm_eval --model hf`, with the same batch size.
"""

import random
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.metrics import mean as harness_mean
from lm_eval.evaluator import evaluate
from lm_eval.models import huggingface
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..scores.score import Report
from .task_cache import Answers
from .tasks import Task, quiet, seed

if TYPE_CHECKING:
    from .served_lm import ServedLM

HFLM: Any = huggingface.HFLM  # whose decorator hides its type from type checkers
SEEDS = (0, 1234)  # lm-evaluation-harness's own: of random, and of numpy and torch


class LoadedLM(HFLM):  # type: ignore[misc]
    """A causal language model of transformers, such as `planish.load` gives.

    prefix: tokens that stand before every text, for which a text has less room. The other settings are HFLM's.
    report: told of batches done and in all; every kind of request begins anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
        if prefix and max_length is None:
            self._max_length = self.max_length - prefix
        self.report: Report | None = None
        self._done = self._batches = 0

    def _begin(self, batches: int) -> None:
        self._done, self._batches = 0, batches

    def _step(self) -> None:
        self._done += 1
        if self.report is not None:
            self.report(min(self._done, self._batches), self._batches)

    def _count(self, requests: int) -> int:
        return -(-requests // self.batch_size) if isinstance(self.batch_size, int) else requests

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(*args, **kwargs)
        self._step()
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            tokens = super()._model_generate(*args, **kwargs)
        self._step()
        return tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As of HFLM, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As of HFLM, without its bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        contexts = {(*context, *continuation[:-1]) for _, context, continuation in requests}  # HFLM runs each of these once
        self._begin(self._count(len(contexts)))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As of HFLM, without its bar."""
        settings = sorted(str(request.args[1]) for request in requests)  # only requests of the same settings share batches
        self._begin(sum(self._count(len(list(same))) for _, same in groupby(settings)))
        return super().generate_until(requests, disable_tqdm=True)


def run_task(lm: "LoadedLM | ServedLM", task: Task) -> dict[str, Any]:
    """lm-evaluation-harness's own results of one task, with all samples, standard errors left out. Seeds are its own, and each task's begin anew."""
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[1])
    seed(task.harness)
    with quiet():
        results: Any = evaluate(lm, {"tasks": {task.name: task.harness}}, limit=task.limit, bootstrap_iters=0)
    return dict(results)


def answers(lm: "LoadedLM | ServedLM", task: Task) -> Answers:
    """What the model makes of a task: its metrics, and those of every sample that they are means of."""
    results = run_task(lm, task)
    values: dict[str, float] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for key, value in results["results"][task.name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        name = metric if filtered == "none" else key
        values[name] = float(value)
        if task.harness.aggregation().get(metric) is harness_mean:
            samples[name] = _of_samples(results["samples"][task.name], metric, filtered)
    better = {name: bool(task.harness.higher_is_better().get(name.partition(",")[0], True)) for name in values}
    return Answers(values=values, samples=samples, higher_is_better=better)


def _of_samples(samples: Sequence[dict[str, Any]], metric: str, filtered: str) -> tuple[float, ...]:
    """In the order of the documents."""
    own = [sample for sample in samples if sample["filter"] == filtered]
    return tuple(float(sample[metric]) for sample in sorted(own, key=lambda sample: int(sample["doc_id"])))
