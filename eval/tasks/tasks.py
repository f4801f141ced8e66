"""Tasks of lm-evaluation-harness: found by name, loaded, and told apart by the requests that they make to a model.

That library is the extra planish[eval]: it is imported only when tasks are asked for, and every import of it goes through here or harness.py.
"""

import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from yaml import YAMLError

from ...quant.errors import PlanishError, nearest

LIBRARY = "lm_eval"
_NAMED = re.compile(r"^(?:task|group|tag): *[\"']?([\w.:/-]+)", re.MULTILINE)
FEWSHOT_SEED = 1234  # lm-evaluation-harness's own, with which it draws the examples that are shown
_BROKEN = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError, TemplateError, YAMLError)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Task:
    """A task that is ready to run. harness: lm-evaluation-harness's object. sha256: of its requests, documents and metrics. limit: documents at most;
    samples: documents there are."""

    name: str
    harness: Any
    sha256: str
    limit: int | None
    samples: int

    @property
    def version(self) -> str:
        """The task's own."""
        return str(self.harness.VERSION)

    @property
    def shots(self) -> int:
        """Examples that are shown before each question."""
        return int(self.harness.config.num_fewshot or 0)


def check_installed() -> None:
    """PlanishError if lm-evaluation-harness is not there."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise PlanishError("Tasks need lm-evaluation-harness, which is not installed. Run: pip install 'planish[eval]'")


def check_names(names: Sequence[str], include_path: str | Path | None = None) -> None:
    """PlanishError if a name stands in no task file at all. A second's work, where reading what the files mean takes the library ten.

    include_path: as of `open_tasks`. Passing says little: a name may be part of another word.
    """
    check_installed()
    spec = importlib.util.find_spec(LIBRARY)
    assert spec is not None
    folders = [] if include_path is None else [_folder(include_path)]
    folders += [Path(place) / "tasks" for place in spec.submodule_search_locations or ()]
    missing, known = {name.strip() for name in names if name.strip()}, set[str]()
    for text in itertools.chain.from_iterable(map(_task_files, folders)):
        missing = {name for name in missing if name not in text}
        if not missing:
            return
        known.update(_NAMED.findall(text))
    name = next(name.strip() for name in names if name.strip() in missing)
    raise PlanishError(f"Task {name} is unknown. {_near(name, sorted(known))}")


def _folder(include_path: str | Path) -> Path:
    folder = Path(include_path).expanduser()
    if not folder.is_dir():
        raise PlanishError(f"include path {folder}: no such folder. Give a folder of task files (.yaml).")
    if not any(folder.rglob("*.yaml")):
        raise PlanishError(f"include path {folder}: holds no task file (.yaml).")
    return folder


def _task_files(folder: Path) -> Iterator[str]:
    """The texts of a folder's task files and of what they include."""
    for file in sorted(folder.rglob("*yaml*")):
        if file.is_file():
            yield file.read_text(encoding="utf-8", errors="replace")


def open_tasks(names: Sequence[str], *, limit: int | None = None, include_path: str | Path | None = None) -> tuple[Task, ...]:
    """The tasks of these names, groups and tags taken apart into their tasks, each once, with the first `limit` documents (None: all).

    include_path: a folder of YAML files with further tasks; data files that they name are relative to the working folder. Raises PlanishError: the
    library is not installed, no such folder or task, data that cannot be had, tasks that run code which the model writes or show it pictures.
    """
    check_installed()
    if limit is not None and limit < 1:
        raise PlanishError(f"limit is {limit}, but must be at least 1. Leave it out for all documents.")
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise PlanishError("tasks: no name is given. Give some, separated by commas, such as arc_easy,piqa.")
    manager = _manager(wanted, include_path)
    unknown = [name for name in wanted if name not in manager.task_index]
    if unknown:
        raise PlanishError(f"Task {unknown[0]} is unknown. {_near(unknown[0], manager.all_tasks)}")
    tasks = {}
    with quiet():
        for name in wanted:
            tasks.update(_load(manager, name))
        return tuple(_ready(name, task, limit) for name, task in tasks.items())


def _near(name: str, known: Sequence[str]) -> str:
    """The near names, or where to look: thousands are known."""
    words = nearest(name, known)
    return words if words.startswith("Did you mean") else "See all with `lm-eval ls tasks`, or give the folder of your own with --include-path."


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """An index of tasks: of the folder alone where it has them all, for reading the library's own takes some ten seconds."""
    tasks = importlib.import_module("lm_eval.tasks")
    if include_path is None:
        return tasks.TaskManager()
    folder = _folder(include_path)
    own = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if not own.all_tasks:
        raise PlanishError(f"include path {folder}: holds no task file (.yaml) that can be read.")
    return own if set(names) <= set(own.all_subtasks) else tasks.TaskManager(include_path=str(folder))


def _load(manager: Any, name: str) -> dict[str, Any]:
    broken: tuple[type[Exception], ...] = (*_BROKEN, *_hub_errors())
    try:
        found: dict[str, Any] = manager.load([name])["tasks"]
    except broken as error:
        raise PlanishError(
            f"Task {name} cannot be loaded: {type(error).__name__}: {error} Check its file, the data that it names (relative to the working folder), "
            "and the network."
        ) from error
    return found


def _hub_errors() -> tuple[type[Exception], type[Exception]]:
    """What fetching data raises besides the ordinary."""
    hub: Any = importlib.import_module("huggingface_hub.errors")
    exceptions: Any = importlib.import_module("datasets.exceptions")
    return hub.HTTPError, exceptions.DatasetsError


def _ready(name: str, task: Any, limit: int | None) -> Task:
    """Settings as lm-evaluation-harness has them by default, and the requests, of which the digest is made."""
    if getattr(task, "UNSAFE_CODE", False):
        raise PlanishError(f"Task {name} runs code that the model writes, which planish does not. Run it with lm_eval and its own consent.")
    if getattr(task, "MULTIMODAL", False):
        raise PlanishError(f"Task {name} shows pictures or sounds, which language models do not take.")
    try:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        seed(task)
        task.build_all_requests(limit=limit)
        samples = len({instance.doc_id for instance in task.instances})
        return Task(name=name, harness=task, sha256=_digest(task), limit=limit, samples=samples)
    except _BROKEN as error:
        raise PlanishError(f"Task {name} cannot be run: {type(error).__name__}: {error} Check its file and its data.") from error


def seed(task: Any) -> None:
    """Begin the drawing of examples anew, so that the same requests come out."""
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _digest(task: Any) -> str:
    """SHA-256 (hex) over every request with its document, and over how answers are judged."""
    judged = {key: value for key, value in task.dump_config().items() if key not in ("metadata", "dataset_kwargs")}
    digest = hashlib.sha256(_text([judged, str(task.VERSION), sorted(task.higher_is_better().items())]))
    for instance in task.instances:
        digest.update(_text([instance.request_type, instance.args, instance.doc, instance.doc_id, instance.idx]))
    return digest.hexdigest()


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=_named).encode()


def _named(value: object) -> str:
    """What JSON lacks: functions by their names, which stay the same from run to run, as their addresses do not."""
    return str(getattr(value, "__qualname__", None) or (repr(value) if not callable(value) else type(value).__qualname__))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of datasets and of lm-evaluation-harness while the `with` lasts."""
    bars: Any = importlib.import_module("datasets.utils.tqdm")
    task: Any = importlib.import_module("lm_eval.api.task")
    shown, bar = not bars.are_progress_bars_disabled(), task.tqdm
    bars.disable_progress_bars()
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar
        if shown:
            bars.enable_progress_bars()
