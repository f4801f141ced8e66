"""A running OpenAI-compatible server (vLLM, SGLang, ...): who it is, what it serves, and its answers as plain data.

Only what such servers have in common is relied on: GET /v1/models and POST /v1/completions. What single ones add is used where it is there:
`root` and `max_model_len` of a model, /tokenize, /version (vLLM), /get_server_info (SGLang).
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...calib.files.checkpoint import Checkpoint
from ...calib.files.shards import read_json
from ...quant.errors import PlanishError, nearest
from ..scores.evaluation import ServedBy

SECONDS = 600.0  # for one answer
KEY = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SAMPLE = "Metal is flattened by hammering: 3.14159 mm a blow, naïve ÜBER-smooth, 平らに\n\tdef planish(x): return x"
_START = "Start one, such as `vllm serve DIR --max-model-len 2049`, wait until it is ready, and give its address, such as http://127.0.0.1:8000"


class Refused(PlanishError):
    """The server answered with an error of its own. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Client:
    """Asks and gets JSON. url: without /v1; seconds: how long an answer may take. The key in OPENAI_API_KEY, if there is one, goes along."""

    url: str
    seconds: float = SECONDS

    def get(self, path: str) -> Any:
        """The answer to GET. Raises PlanishError: no answer in time, or none in JSON; Refused: an error of the server's."""
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to POST of JSON. Errors as of get."""
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        # a proxy that the environment names cannot know this machine's own addresses
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(self.url).hostname in _LOOPBACK else []
        try:
            with urllib.request.build_opener(*proxies).open(request, timeout=self.seconds) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(f"server {self.url}{path}: HTTP {error.code}: {_reason(error)}{_advice(error.code)}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise PlanishError(f"server {self.url}{path}: no answer within {self.seconds:g} seconds. Allow more, or look at its log.") from None
            raise PlanishError(f"server {self.url}: none answers there ({reason}). {_START}.") from None
        except ValueError:
            raise PlanishError(f"server {self.url}{path}: answers, but not in JSON, so it is no OpenAI-compatible server. {_START}.") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What an error's body says, in the ways of vLLM, SGLang and others."""
    text = error.read().decode(errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        return text[:300] or str(error.reason)
    inner = data.get("error", data) if isinstance(data, dict) else data
    said = (inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else inner
    return str(said)[:300]


def _advice(status: int) -> str:
    return f". Set {KEY} to the server's key." if status in (401, 403) else ""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that serves the checkpoint as far as can be told. model: the name it goes by there; root: where the server says that it has it from.

    engine, version: None where the server does not tell. context: tokens at most, prompt and answer together; None: not told.
    """

    client: Client
    model: str
    root: str | None
    engine: str | None
    version: str | None
    context: int | None

    @property
    def words(self) -> str:
        """vLLM 0.32.0 at http://127.0.0.1:8000."""
        return f"{' '.join(filter(None, (self.engine, self.version))) or 'a server'} at {self.client.url}"

    def described(self) -> ServedBy:
        """For a result."""
        return ServedBy(url=self.client.url, model=self.model, root=self.root, engine=self.engine, version=self.version, context=self.context)


def connect(url: str, checkpoint: Checkpoint, *, model: str | None = None, seconds: float = SECONDS) -> Server:
    """The server at `url`, checked to serve this checkpoint.

    model: its name there, where the server has several; None: the only one, or the one whose path or name is the checkpoint's.
    Raises PlanishError: no server there, or it serves something else: another name, another folder with another config.json, another tokenizer.
    """
    client = Client(_address(url), seconds)
    models = client.get("/v1/models")
    listed = models.get("data") if isinstance(models, dict) else None
    if not listed or not all(isinstance(one, dict) and "id" in one for one in listed):
        raise PlanishError(f"server {client.url}: /v1/models lists no model, so it is no OpenAI-compatible server, or not ready. {_START}.")
    chosen = _chosen(client.url, listed, checkpoint.path, model)
    root = chosen.get("root")
    _check_folder(client.url, root, checkpoint.path)
    _check_tokenizer(client, chosen["id"], checkpoint)
    engine, version = _version(client, chosen.get("owned_by"))
    return Server(client, chosen["id"], root, engine, version, chosen.get("max_model_len"))


def _address(url: str) -> str:
    """Without what follows the host, /v1 and the like."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PlanishError(f"server {url!r} is no address. Write it in full, such as http://127.0.0.1:8000.")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/completions').removesuffix('/v1')}"


def _chosen(url: str, listed: list[dict[str, Any]], folder: Path, model: str | None) -> dict[str, Any]:
    names = [one["id"] for one in listed]
    if model is not None:
        if model not in names:
            raise PlanishError(f"server {url}: serves no model named {model}. {nearest(model, names)}")
        return listed[names.index(model)]
    own = [one for one in listed if folder.resolve() in (Path(one["id"]).resolve(), Path(one.get("root") or one["id"]).resolve())]
    named = [one for one in listed if folder.resolve().name in (one["id"].rstrip("/").rpartition("/")[2],)]
    found = own or named or listed
    if len(found) > 1:
        raise PlanishError(f"server {url}: serves {', '.join(names)}, and none is plainly {folder}. Give the name that it has there.")
    return found[0]


def _check_folder(url: str, root: object, folder: Path) -> None:
    """Where the server's folder is on this machine, it is the checkpoint's or one with the same config.json."""
    there = Path(root) if isinstance(root, str) else folder
    if not (there / "config.json").is_file() or there.resolve() == folder.resolve():
        return
    if read_json(there / "config.json") != read_json(folder / "config.json"):
        raise PlanishError(f"server {url}: serves {there}, which is another model than {folder}. Restart it with {folder}, or give that folder.")


def _check_tokenizer(client: Client, model: str, checkpoint: Checkpoint) -> None:
    """The server makes the same tokens of a text, if it says."""
    try:
        answer = client.post("/tokenize", {"model": model, "prompt": _SAMPLE, "add_special_tokens": False})
    except Refused:
        return
    theirs = answer.get("tokens") if isinstance(answer, dict) else None
    own = checkpoint.tokenizer().encode(_SAMPLE, add_special_tokens=False)
    if theirs is not None and theirs != own:
        raise PlanishError(
            f"server {client.url}: {model} makes other tokens of a text than {checkpoint.path} does, so it is another model. "
            f"Restart the server with {checkpoint.path}, or give the checkpoint that it serves."
        )


def _version(client: Client, owner: object) -> tuple[str | None, str | None]:
    """The engine and its version, where told."""
    engine = {"vllm": "vLLM", "sglang": "SGLang"}.get(str(owner).lower())
    for path in ("/version", "/get_server_info"):
        try:
            answer = client.get(path)
        except PlanishError:
            continue
        if isinstance(answer, dict) and isinstance(answer.get("version"), str):
            return engine, answer["version"]
    return engine, None
