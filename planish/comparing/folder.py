"""The folder of a comparison, so that the same command goes on where it was.

about.json           which comparison this is: model, texts, arithmetic, versions
results/NAME.json    a recipe that is done
working/             while the work lasts: the base model's hidden states, calibration tokens, the checkpoint at work
checkpoints/NAME/    the compressed checkpoints, where they are to be kept
comparison.html, comparison.json, comparison.md, comparison.svg      at the end
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calib.files.shards import read_json
from ..common.decode import decode
from ..common.files import write_text
from ..common.outfile import ABOUT
from ..common.schemas import plain
from ..quant.errors import PlanishError
from .report import Done

FILES = ("comparison.html", "comparison.json", "comparison.md", "comparison.svg")


_WHENCE = {"texts": "their --windows and --length count too", "threads": "--jobs shares the cores out"}


def _apart(key: str, there: Any, now: Any) -> str:
    """What two comparisons do not share, with the values where they can be read: threads (2 there, 1 now; --jobs shares the cores out)."""
    values = [] if key in ("model", "texts") else [f"{_said(there)} there, {_said(now)} now"]
    words = "; ".join([*values, *([_WHENCE[key]] if key in _WHENCE else [])])
    return f"{key} ({words})" if words else key


def _said(value: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else str(value)


@dataclass(frozen=True, slots=True)
class Folder:
    """Where things are in a comparison's folder, which need not exist yet."""

    path: Path

    @property
    def working(self) -> Path:
        """What is removed at the end."""
        return self.path / "working"

    @property
    def reference(self) -> Path:
        """What the base model says of the texts."""
        return self.working / "reference.safetensors"

    def looks(self, shared: str) -> Path:
        """What recipes have seen of the model in full precision, those that share it."""
        return self.working / f"looks-{shared}"

    @property
    def files(self) -> tuple[Path, ...]:
        """What is written at the end: page, JSON, Markdown, picture."""
        return tuple(self.path / name for name in FILES)

    @property
    def page(self) -> Path:
        """The one to look at first."""
        return self.path / FILES[0]

    def checkpoint(self, name: str) -> Path:
        """Where a recipe's checkpoint is kept."""
        return self.path / "checkpoints" / name

    def check(self, about: Mapping[str, Any], recipes: Mapping[str, tuple[str, str | None]]) -> None:
        """PlanishError if another comparison is there: about something else, or with results of other recipes. recipes: by name, the digests of the
        recipe and of its calibration tokens."""
        if not self.path.exists():
            return
        known = read_json(self.path / ABOUT)
        other = [_apart(key, known.get(key), value) for key, value in about.items() if known.get(key) != value]
        if other:
            raise PlanishError(
                f"{self.path}: holds another comparison: not the same {', '.join(other)}. Repeat its settings, or choose another output folder."
            )
        for name, done in self.done().items():
            if recipes.get(name) != (done.row.sha256, done.row.calibration_sha256):
                raise PlanishError(
                    f"{self.path}: holds a result of another recipe {name}, or of this one with other settings or calibration text. "
                    "Repeat the recipes and settings of that comparison, to which recipes may be added, or choose another output folder."
                )

    def create(self, about: Mapping[str, Any]) -> None:
        """Make the folder, whole or not at all, unless it is there."""
        if not self.path.exists():
            new = self.path.with_name(self.path.name + ".new")
            new.mkdir(parents=True, exist_ok=True)
            write_text(new / ABOUT, json.dumps(about, indent=2) + "\n")
            new.rename(self.path)
        self.working.mkdir(exist_ok=True)

    def done(self) -> dict[str, Done]:
        """The recipes that are done, by name."""
        files = sorted((self.path / "results").glob("*.json"))
        return {file.stem: decode(Done, dict(read_json(file)), str(file), nonfinite=True) for file in files}

    def add(self, name: str, done: Done) -> None:
        """Keep a recipe's result."""
        (self.path / "results").mkdir(exist_ok=True)
        write_text(self.path / "results" / f"{name}.json", json.dumps(plain(done), indent=2, allow_nan=False) + "\n")

    def finish(self, page: str, json_text: str, markdown: str, picture: str) -> None:
        """Write the comparison, and remove what was needed on the way."""
        for file, text in zip(self.files, (page, json_text, markdown, picture), strict=True):
            write_text(file, text)
        shutil.rmtree(self.working)
