"""A running server, as lm-evaluation-harness runs a model. Imports that library, the extra planish[eval]: import it late.

Requests are made into token numbers here, exactly as HFLM makes them for a model in memory, and the server gets numbers. lm-evaluation-harness's own
`local-completions` asks the same of a server, but leaves out the token for a beginning that HFLM takes from the tokenizer, tells greedy answers by
comparing rounded numbers, and needs further packages.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from ...quant.errors import PlanishError
from ..scores.score import Report
from ..servers.client import Server
from ..servers.served import generate, said_of

NEW_TOKENS = 256  # of an answer at most, where the task does not say: HFLM's number
CONTEXT = 2048  # where neither server nor model says how long a text may be

T = TypeVar("T")


class ServedLM(TemplateLM):  # type: ignore[misc]
    """A server's model. max_length: tokens of a text at most, as of HFLM; less where the server's context leaves no room for them and two more: the
    token that is predicted last, and the one that a server always adds. batch_size: requests that are under way at once.

    report: told of requests done and in all; every kind of request begins anew.
    """

    backend = "causal"

    def __init__(self, server: Server, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, batch_size: int = 1) -> None:
        super().__init__()
        self.server, self.batch_size = server, batch_size
        self.tokenizer: Any = tokenizer
        room = [length for length in (max_length, None if server.context is None else server.context - 2) if length is not None]
        self.max_length = min(room, default=CONTEXT)
        self.report: Report | None = None

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's."""
        found: int = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        found: int = self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As of HFLM: the tokenizer's own special tokens, unless the text begins with them."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        settings: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        found: list[int] = self.tokenizer.encode(string, **settings)
        return found

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As of TemplateLM, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._all(self._likely, [(context, continuation) for _, context, continuation in requests])

    def _likely(self, pair: tuple[list[int], list[int]]) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether it is what the model would have said."""
        context, continuation = pair
        said = said_of(self.server, (context + continuation)[-(self.max_length + 1) :])
        count = len(continuation)
        return sum(said.logprobs[-count:]), all(said.greedy[-count:])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows where they are long, as of HFLM."""
        return self._all(self._rolling, [request.args[0] for request in requests])

    def _rolling(self, text: str) -> float:
        pieces = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return sum(self._likely(pair)[0] for pair in map(make_disjoint_window, pieces))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers in the server's own words, up to a stop, as of HFLM."""
        return self._all(self._answer, [request.args for request in requests])

    def _answer(self, asked: tuple[str, dict[str, Any]]) -> str:
        text, settings = asked[0], dict[str, Any](normalize_gen_kwargs(asked[1], NEW_TOKENS))
        until = handle_stop_sequences(settings.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        new = settings.pop("max_gen_toks")
        if new >= self.max_length:
            raise PlanishError(
                f"{self.server.words}: a task asks for {new} new tokens, but texts have at most {self.max_length}. Restart it with a longer context."
            )
        sampling = {name: settings[name] for name in ("temperature", "top_p", "top_k") if settings.get("do_sample") and name in settings}
        ids = self.tok_encode(text)[-(self.max_length - new) :]
        said = generate(self.server, ids, {"max_tokens": new, "temperature": 0, "stop": until, **sampling})
        found: str = postprocess_generated_text(said, until, None)
        return found

    def _all(self, ask: Callable[[Any], T], questions: Iterable[Any]) -> list[T]:
        """The answers, in order, so many at once."""
        waiting, found = list(questions), []
        with ThreadPoolExecutor(self.batch_size) as pool:
            try:
                for answer in pool.map(ask, waiting):
                    found.append(answer)
                    if self.report is not None:
                        self.report(len(found), len(waiting))
            finally:
                pool.shutdown(cancel_futures=True)
        return found
