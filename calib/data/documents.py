"""Where text comes from: what planish brings along, a local file, or a dataset on the Hub, as a sequence of documents.

    builtin                        text/*.txt, written for planish, of many kinds; behind it Python's documentation (pydoc_data.topics), whose wording
                                   differs a little between Python versions
    notes.txt                      one document
    rows.jsonl  rows.parquet       one document a line or row: field text, or a conversation in messages or conversations
    hub:NAME[:CONFIG[:SPLIT]]      the same fields; CONFIG may be empty, SPLIT is train unless given

Parquet and the Hub need the extra planish[data].
"""

import importlib
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, Literal

from ...quant.errors import PlanishError, nearest

Part = Literal["calibration", "evaluation", "all"]
Message = dict[str, str]
Document = str | list[Message]

_FIELDS = ("text", "messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_PROSE, _BETWEEN = Path(__file__).with_name("text"), "\n%%\n"
_HOW = "Give builtin, a .txt, .jsonl or .parquet file, or hub:NAME."


def take(source: str, part: Part, characters: int | None) -> tuple[list[Document], bool]:
    """The first documents of a source, about that many characters of them (None: all), and whether that was everything.

    part: which half of the builtin text; every other source is taken whole. Not much more is read than is asked for.
    Raises PlanishError for a source that is unknown, missing, unreadable or malformed, naming the line or row.
    """
    taken: list[Document] = []
    size = 0
    for document in _documents(source, part, characters):
        if characters is not None and size >= characters:
            return taken, False
        taken.append(document)
        size += len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)
    return taken, True


def prose() -> list[str]:
    """What was written for planish: articles, stories, letters and reports, one of each kind in turn."""
    kinds = [path.read_text(encoding="utf-8").split(_BETWEEN) for path in sorted(_PROSE.glob("*.txt"))]
    return [document.strip() for round_ in zip_longest(*kinds, fillvalue="") for document in round_ if document.strip()]


def builtin(part: Part) -> list[str]:
    """What planish brings along: its own text, then Python's documentation, topics in the order of their names.

    calibration: the text, and the first half of the topics by characters. evaluation: the other topics, without the paragraphs that the first half
    quotes too, so that nothing is evaluated that was calibrated on. all: everything.
    """
    texts = [topics[name] for name in sorted(topics)]
    if part == "all":
        return [*prose(), *texts]
    half, size, first = sum(map(len, texts)) / 2, 0, 0
    while size < half:
        size += len(texts[first])
        first += 1
    if part == "calibration":
        return [*prose(), *texts[:first]]
    seen = {paragraph for text in texts[:first] for paragraph in text.split("\n\n")}
    kept = ("\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in seen) for text in texts[first:])
    return [text for text in kept if text.strip()]


def _documents(source: str, part: Part, characters: int | None) -> Iterator[Document]:
    check_source(source)
    if source == "builtin":
        return iter(builtin(part))
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    return _text(path, characters) if suffix == ".txt" else _READERS[suffix](path)


def check_source(source: str | None) -> None:
    """PlanishError for a source of no known kind, or a file that cannot be opened. What is in it comes later. None: there is none to look at."""
    if source is None or source == "builtin" or source.startswith("hub:"):
        return
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not suffix and not path.exists():
        raise PlanishError(f"Text source {source} is unknown. {nearest(source, ['builtin'])} {_HOW}")
    try:
        path.open("rb").close()
    except OSError as error:
        named = str(path).partition("=")[2]  # as `planish compare` has them
        how = f"Texts have no names here: give {named}." if named and Path(named).is_file() else _HOW
        raise PlanishError(f"Text source {path} cannot be read: {error.strerror}. {how}") from error
    if suffix != ".txt" and suffix not in _READERS:
        raise PlanishError(f"Text source {path} ends in {suffix or 'no suffix'}, so its format is unknown. {_HOW}")


def _text(path: Path, characters: int | None) -> Iterator[str]:
    """Pieces of that many characters: take() uses the first alone, and a second tells it that there is more."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(characters):
                yield piece
    except UnicodeDecodeError as error:
        raise PlanishError(f"Text source {path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise PlanishError(f"{where}: not a line of JSON in UTF-8 ({error}). Write one object a line.") from error
            yield _document(record, where)


def _parquet(path: Path) -> Iterator[Document]:
    arrow, parquet = _extra("pyarrow", path.name), _extra("pyarrow.parquet", path.name)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in _FIELDS]
            if not columns:
                raise PlanishError(f"{path}: no column {', '.join(_FIELDS)}; it has {', '.join(names) or 'none'}. Name the text's column text.")
            rows = (row for batch in file.iter_batches(batch_size=256, columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield _document(row, f"{path} row {number}")
    except arrow.ArrowException as error:
        raise PlanishError(f"Text source {path} is not a sound Parquet file ({error}).") from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {".jsonl": _jsonl, ".parquet": _parquet}


def _hub(source: str) -> Iterator[Document]:
    name, config, split = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    if not name or source.count(":") > 3:
        raise PlanishError(f"Text source {source} does not read hub:NAME[:CONFIG[:SPLIT]].")
    datasets, hub = _extra("datasets", source), _extra("huggingface_hub.errors", source)
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _document(row, f"{source} row {number}")
    except (OSError, ValueError, RuntimeError, hub.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise PlanishError(f"Text source {source} cannot be had: {error} Check name, config, split and network, or give a local file.") from error


def _extra(module: str, source: str) -> ModuleType:
    """A module of the extra planish[data]."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlanishError(f"Text source {source} needs {module}, which is not installed. Run: pip install 'planish[data]'") from error


def _document(record: object, where: str) -> Document:
    """The text or conversation of one record, checked."""
    if not isinstance(record, dict):
        raise PlanishError(f"{where}: a {type(record).__name__} where an object with a field text or messages is needed.")
    field = next((name for name in _FIELDS if record.get(name) is not None), None)
    if field is None:
        found = ", ".join(map(str, record)) or "nothing"
        raise PlanishError(f"{where}: no value in a field {', '.join(_FIELDS)}; it has {found}. Name the text's field text.")
    return _string(record[field], f"{where}: {field}") if field == "text" else _messages(record[field], f"{where}: {field}")


def _messages(value: object, where: str) -> list[Message]:
    """Messages as {role, content}, from that form or from {from, value}."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise PlanishError(f'{where} is not a list of messages. Write [{{"role": "user", "content": "..."}}, ...].')
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(message: dict[str, Any], where: str) -> Message:
    role, content = ("from", "value") if "from" in message else ("role", "content")
    if role not in message or content not in message:
        raise PlanishError(f"{where} has {', '.join(map(str, message)) or 'no keys'}, but a message has role and content (or from and value).")
    speaker = _string(message[role], f"{where}.{role}")
    return {"role": _ROLES.get(speaker, speaker), "content": _string(message[content], f"{where}.{content}")}


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PlanishError(f"{where} is a {type(value).__name__}, not a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PlanishError(f"{where} holds half a surrogate pair at character {error.start}, which no tokenizer reads. Mend or drop it.") from error
    return value
