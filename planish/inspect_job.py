"""One inspection as the command line does it: check, inspect, write the files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .calib.diagnosis import OutlierReport, Thresholds
from .decode import decode
from .eval.outlier_page import outlier_page
from .eval.pictures import plotly_script
from .inspect_json import from_dict
from .inspection import inspect
from .journal import write_text
from .quant.errors import PlanishError
from .yamltext import parse_yaml

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectJob:
    """What the user asked for. source to allow_pickle: those of `planish.inspect`, with thresholds as NAME=VALUE. against: another model, or a report
    in a .json file. html, recipe: files to write; force: even if they exist."""

    model: str
    source: str | None = None
    images: str | None = None
    samples: int = 32
    length: int = 512
    seed: int = 0
    against: str | None = None
    html: Path | None = None
    recipe: Path | None = None
    bits: str = "w8a8"
    thresholds: tuple[str, ...] = ()
    force: bool = False
    device: str | None = None
    dtype: torch.dtype | None = None
    offload_dir: Path | None = None
    allow_pickle: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that will be written."""
        return tuple(path for path in (self.html, self.recipe) if path is not None)

    def check(self) -> OutlierReport | None:
        """Refuse what can be refused before the work; the report to compare with, if it is in a file."""
        for path in self.files:
            if not path.absolute().parent.is_dir():
                raise PlanishError(f"{path}: there is no folder {path.parent}. Make it first, or give another name.")
            if path.is_dir():
                raise PlanishError(f"{path}: is a folder. Give the name of a file.")
            if not self.force and (path.exists() or path.is_symlink()):
                raise PlanishError(f"{path}: exists, and planish overwrites nothing unasked. Choose another name, or add --force.")
        if self.html is not None:
            plotly_script()  # says so if it is not installed
        self._limits()
        return None if self.against is None or Path(self.against).suffix != ".json" else _read(Path(self.against))

    def run(self, base: OutlierReport | None, tell: Report) -> tuple[OutlierReport, OutlierReport | None]:
        """Inspect, and write the files. base: what check returned. Returns what was found in the model, and in the one it is compared with."""
        found = self._inspect(self.model, tell)
        if self.against is not None and base is None:
            base = self._inspect(self.against, lambda stage, done, total: tell(f"{stage} of the other", done, total))
        if base is not None:
            _check_alike(found, base)
        recipe = None if self.recipe is None else _recipe(found)
        if self.html is not None:
            write_text(self.html, outlier_page(found, base))
        if self.recipe is not None and recipe is not None:
            write_text(self.recipe, recipe)
        return found, base

    def _limits(self) -> Thresholds:
        return decode(Thresholds, dict(map(_setting, self.thresholds)), "--threshold")

    def _inspect(self, model: str, tell: Report) -> OutlierReport:
        return inspect(
            model,
            source=self.source,
            images=self.images,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            thresholds=self._limits(),
            bits=self.bits,
            device=self.device,
            dtype=self.dtype,
            offload_dir=self.offload_dir,
            allow_pickle=self.allow_pickle,
            progress=tell,
        )


def _setting(text: str) -> tuple[str, object]:
    name, sign, value = text.partition("=")
    if not sign:
        raise PlanishError(f"--threshold {text!r} is not a setting. Write NAME=VALUE, such as massive_ratio=500.")
    return name, parse_yaml(value, f"--threshold {text}")


def _read(path: Path) -> OutlierReport:
    """The report that `planish inspect --json` printed."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read ({error.strerror}). Give a model, or what `planish inspect --json` printed.") from error
    except ValueError as error:
        raise PlanishError(f"{path}: not JSON ({error}). Give what `planish inspect --json` printed.") from error
    return from_dict(data, str(path))


def _check_alike(found: OutlierReport, base: OutlierReport) -> None:
    """Only models of one shape stand side by side."""
    if (found.family, found.blocks, found.hidden) != (base.family, base.blocks, base.hidden):
        words = (f"{one.model} is a {one.family} model of {one.blocks} blocks and width {one.hidden}" for one in (found, base))
        raise PlanishError(f"{', '.join(words)}: one was not made from the other. Give --against the model that was compressed.")


def _recipe(found: OutlierReport) -> str:
    if found.recommendation is None:
        kind = "a compressed model" if found.compressed else "this model"
        raise PlanishError(f"{found.model}: nothing is recommended for {kind}. Leave out --recipe.")
    return found.recommendation.recipe
