"""Whether an argument can be a model at all, told from its spelling and from what lies there. Light to import: a slip is refused at once."""

import re
from pathlib import Path

from ...quant.errors import PlanishError
from .demo import DEMOS, find_demo

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DEMO = "demo:"


def check_models(*models: str | Path | None) -> None:
    """As check_model, of all that are given."""
    for model in models:
        if model is not None:
            check_model(model)


def check_model(model: str | Path) -> None:
    """PlanishError if it is none of what a model can be: a folder, a .gguf file, `demo:NAME` of a known name, or a Hub name `org/name`."""
    if isinstance(model, str) and model.startswith(DEMO):
        find_demo(model.removeprefix(DEMO))
        return
    path = Path(model).expanduser()
    gguf = path.suffix.lower() == ".gguf"
    if path.is_dir() or (gguf and path.is_file()):
        return
    if path.is_file():
        raise PlanishError(f"{model}: a file. Give the folder that holds config.json and the weights, or a .gguf file.")
    if gguf or not (isinstance(model, str) and HUB_NAME.fullmatch(model)):
        demos = ", ".join(f"{DEMO}{name}" for name in DEMOS)
        raise PlanishError(f"{model}: no such folder. A model is a local folder, a Hub name (org/name), a .gguf file or one of {demos}.")


def check_checkpoint(folder: Path) -> None:
    """PlanishError if it cannot be the folder of a compressed checkpoint."""
    if not folder.is_dir():
        raise PlanishError(f"{folder}: {'a file' if folder.is_file() else 'no such folder'}. Give the folder of a compressed checkpoint.")
    if not (folder / "config.json").is_file():
        raise PlanishError(f"{folder}: holds no config.json. Give the folder of a compressed checkpoint.")
