"""Several recipes on one model, side by side: what a comparison holds, as data. JSON of it: common/schemas.py; Markdown: text.py."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..eval.scores.score import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text that all models are measured on. source: as of `planish verify --text`; builtin: its half for evaluation. windows of length tokens each.
    sha256: of the token numbers as 64-bit integers."""

    name: str
    source: str
    windows: int
    length: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A compressed model on one text. change: of the perplexity against full precision, 0.01 being one percent more. kl: mean KL divergence from full
    precision in nats per token. agreement: share of tokens for which both models find the same next token likeliest."""

    perplexity: float
    change: float
    kl: float
    agreement: float

    @classmethod
    def of(cls, found: Comparison) -> "Quality":
        """From both models' scores."""
        before, after = found.base.perplexity, found.quantized.perplexity
        return cls(perplexity=after, change=after / before - 1, kl=found.kl, agreement=found.agreement)


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The model in full precision. bits: of a weight. bytes: of all weights. perplexity: by the name of the text."""

    bits: int
    bytes: int
    perplexity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one recipe made of the model. recipe: its name; sha256: its digest. calibration_sha256: of the token numbers that it was calibrated on.
    bits_per_weight: of quantized weights, scales included. bytes: of all weights. seconds: to compress, check and write, without the measuring here.
    peak_bytes: the most memory that the compressing process held, not counting a GPU's. resumed: the compression was interrupted; what was done twice
    counts twice. servers: who runs the checkpoint as it was measured. quality: by the name of the text. checkpoint: where it is kept, if it is."""

    recipe: str
    description: str
    sha256: str
    calibration_sha256: str | None
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_bytes: int
    resumed: bool
    servers: tuple[str, ...]
    notes: tuple[str, ...]
    quality: Mapping[str, Quality]
    checkpoint: str | None

    @property
    def kl(self) -> float:
        """On the text where it is largest."""
        return _worst(quality.kl for quality in self.quality.values())

    @property
    def change(self) -> float:
        """Of the perplexity, on the text where it is largest."""
        return _worst(quality.change for quality in self.quality.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """What to take for a need. need: best, smallest, quickest or portable. recipe: None if none will do. words: a sentence that says why."""

    need: str
    recipe: str | None
    words: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonReport:
    """Recipes side by side. planish: the version that wrote this. finished: date and time, UTC. model: as given; model_sha256: its fingerprint.
    arithmetic: of the compression; all is measured in float32. threads: of one process. jobs: processes at
    once, at most. versions: of the libraries. fronts: for size and time, the recipes that no other beats in both it and
    quality, the cheapest first."""

    planish: str
    finished: str
    model: str
    model_sha256: str
    family: str
    blocks: int
    arithmetic: str
    device: str
    platform: str
    threads: int
    jobs: int
    versions: Mapping[str, str]
    texts: tuple[Text, ...]
    base: Base
    rows: tuple[Row, ...]
    fronts: Mapping[str, tuple[str, ...]]
    picks: tuple[Pick, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A recipe's part of a comparison, as it is kept until all of it is done. base: the full-precision model's perplexity by the name of the text."""

    row: Row
    base: Mapping[str, float]


def _worst(values: Iterable[float]) -> float:
    """The largest; what is no number counts as infinite."""
    return max(math.inf if math.isnan(value) else value for value in values)
