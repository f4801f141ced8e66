"""A small OpenAI-compatible server in a thread: a tiny model in float32, and the ways of other servers."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import planish
from planish.calib.compressed.stored import open_any


@dataclass
class Ways:
    """What the server does. numbers: prompt_logprobs is known; echo: echo with logprobs is. refuses: the unknown is an error. spoilt: the
    first log-probability, or with numbers all of them, in place of the right ones. calls: paths asked."""

    folder: Path
    names: tuple[str, ...] = ("tiny",)
    root: str | None = None
    context: int | None = 512
    numbers: bool = True
    echo: bool = True
    refuses: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    key: str | None = None
    html: bool = False
    delay: float = 0.0
    shift: int = 0
    spoilt: tuple[float | None, ...] = ()
    calls: list[str] = field(default_factory=list)


class Model:
    """Answers as vLLM gives them."""

    def __init__(self, ways: Ways) -> None:
        self.ways, self.lock = ways, threading.Lock()
        self.model = planish.load(ways.folder, dtype=torch.float32)
        self.tokenizer = ways.tokenizer or open_any(ways.folder).tokenizer()

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": name, "owned_by": "vllm", "root": self.ways.root, "max_model_len": self.ways.context} for name in self.ways.names]}

    def complete(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, ways = asked["prompt"], self.ways
        if ways.context is not None and len(ids) + asked["max_tokens"] > ways.context:
            return 400, {"error": {"message": f"maximum context length is {ways.context} tokens"}}
        if ways.refuses and not ways.numbers and "prompt_logprobs" in asked:
            return 422, {"detail": "prompt_logprobs: extra inputs are not permitted"}
        with self.lock, torch.no_grad():
            choice = {"index": 0, "text": self._text(ids, asked) if "stop" in asked else ""}
            likely_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(1)
        if "prompt_logprobs" in asked and ways.numbers:
            choice["prompt_logprobs"] = [None, *(_entry(likely_TV[i], ids[i + 1] + ways.shift, ways.spoilt) for i in range(len(ids) - 1))]
        if asked.get("echo") and ways.echo:
            values = [*ways.spoilt, *(likely_TV[i, ids[i + 1]].item() for i in range(len(ids) - 1))][: len(ids) - 1]
            tops = [{"of all the likeliest": likely_TV[i].max().item(), "the one": values[i]} for i in range(len(ids) - 1)]
            choice["logprobs"] = {"token_logprobs": [None, *values, -0.5], "top_logprobs": [None, *tops, {"x": -0.5}]}
        return 200, {"choices": [choice]}

    def _text(self, ids: list[int], asked: dict[str, Any]) -> str:
        new: list[int] = []
        for _ in range(asked["max_tokens"]):
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            stops = [text.index(stop) for stop in asked["stop"] if stop in text]
            if stops:
                return text[: min(stops)]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def _entry(likely_V: torch.Tensor, token: int, spoilt: tuple[float | None, ...]) -> dict[str, dict[str, Any]]:
    top = int(likely_V.argmax())
    rank = int((likely_V >= likely_V[token]).sum())
    own, best = (spoilt[0] if spoilt else likely_V[number].item() for number in (token, top))
    return {str(token): {"logprob": own, "rank": rank}, str(top): {"logprob": best, "rank": 1}}


@contextmanager
def serving(folder: Path, **ways: Any) -> Iterator[tuple[str, Ways]]:
    """The server's address while the `with` lasts, and its ways, with the calls that it got."""
    chosen = Ways(folder, **ways)
    model = Model(chosen)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"/v1/models": model.models(), "/version": {"version": "0.0.1"}}.get(self.path))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(chosen.delay)
            if self.path == "/tokenize":
                self._answer({"tokens": model.tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])})
            elif self.path == "/v1/completions":
                status, answer = model.complete(asked)
                self._answer(answer, status)
            else:
                self._answer(None)

        def _answer(self, data: dict[str, Any] | None, status: int = 200) -> None:
            chosen.calls.append(self.path)
            if chosen.key and self.headers.get("Authorization") != f"Bearer {chosen.key}":
                status, data = 401, {"error": "Unauthorized"}
            elif data is None:
                status, data = 404, {"detail": "Not Found"}
            body = b"<html>" if chosen.html else json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", chosen
        finally:
            server.shutdown()
            thread.join()
