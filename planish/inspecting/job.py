"""One inspection as the command line does it: check, inspect, write the files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calib.blocks.topology import topology
from ..calib.compressed.stored import StoredCheckpoint, open_any
from ..calib.files.checkpoint import Checkpoint
from ..calib.outliers.diagnosis import OutlierReport, Thresholds
from ..common.decode import decode
from ..common.files import write_text
from ..common.outfile import check_outfiles
from ..common.page_links import beside
from ..common.yamltext import parse_yaml
from ..eval.pages.outlier_page import outlier_markdown, outlier_page
from ..eval.pages.pictures import plotly_script
from ..quant.errors import PlanishError
from .inspection import inspect
from .recommend import check_bits
from .report_json import from_dict

Report = Callable[[str, int, int], None]
Shape = tuple[str, int, int]
"""Family, blocks and width of a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectJob:
    """What the user asked for. source to allow_pickle: those of `planish.inspect`, with thresholds as NAME=VALUE. against: another model, or a report
    in a .json file. html, markdown, recipe: files to write; force: even if they exist."""

    model: str
    source: str | None = None
    images: str | None = None
    samples: int = 32
    length: int | None = None
    seed: int = 0
    against: str | None = None
    html: Path | None = None
    markdown: Path | None = None
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
        return tuple(path for path in (self.html, self.markdown, self.recipe) if path is not None)

    def check(self) -> OutlierReport | None:
        """Refuse what can be refused before the work; the report to compare with, if it is in a file."""
        check_outfiles({"--html": self.html, "--markdown": self.markdown, "--recipe": self.recipe}, replace=self.force)
        if self.html is not None:
            plotly_script()  # says so if it is not installed
        self._limits()
        check_bits(self.bits)
        model = open_any(self.model, allow_pickle=self.allow_pickle)
        if self.recipe is not None:
            _check_recommendable(self.model, model)
        if self.against is None:
            return None
        if Path(self.against).suffix != ".json":
            _check_alike(self.model, _shape(model), self.against, _shape(open_any(self.against, allow_pickle=self.allow_pickle)))
            return None
        base = _read(Path(self.against))
        _check_alike(self.model, _shape(model), base.model, (base.family, base.blocks, base.hidden))
        return base

    def run(self, base: OutlierReport | None, tell: Report) -> tuple[OutlierReport, OutlierReport | None]:
        """Inspect, and write the files. base: what check returned. Returns what was found in the model, and in the one it is compared with."""
        found = self._inspect(self.model, tell)
        if self.against is not None and base is None:
            base = self._inspect(self.against, lambda stage, done, total: tell(f"{stage} of the other", done, total))
        if self.html is not None:
            write_text(self.html, outlier_page(found, base, links=beside(self.html)))
        if self.markdown is not None:
            write_text(self.markdown, outlier_markdown(found))
        if self.recipe is not None and found.recommendation is not None:
            write_text(self.recipe, found.recommendation.recipe)
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


def _shape(model: Checkpoint) -> Shape:
    found = topology(model.config)
    return found.family, found.block_count, model.config.get_text_config().hidden_size


def _check_alike(name: str, shape: Shape, other: str, base: Shape) -> None:
    """Only models of one shape stand side by side."""
    if shape != base:
        words = [f"{model} is a {one[0]} model of {one[1]} blocks and width {one[2]}" for model, one in ((name, shape), (other, base))]
        raise PlanishError(f"{', '.join(words)}: one was not made from the other. Give --against the model that was compressed.")


def _check_recommendable(name: str, model: Checkpoint) -> None:
    """Recipes are for models that can be compressed."""
    kind = "a compressed model" if isinstance(model, StoredCheckpoint) else "a vision model" if topology(model.config).vision else None
    if kind is not None:
        raise PlanishError(f"{name}: nothing is recommended for {kind}. Leave out --recipe.")
