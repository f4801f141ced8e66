"""What a compression leaves written of itself beside the checkpoint, as data. Made in reporting.py; JSON of it: common/schemas.py; page: page.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..eval.scores.gate import Judgement
from ..walk.records import BlockRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Of all weights, before and after."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFormat:
    """How a site is stored in some blocks, in words. None: in full precision, or activations that stay so. layout: of the codes."""

    blocks: tuple[int, ...]
    weights: str | None
    activations: str | None
    layout: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticReport:
    """Of the walk over the blocks."""

    dtype: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What was planned. recipe: with every setting. model: the folder. sites: by name, how they are stored. memory, memory_evaluating: estimated
    bytes by part, and in all; memory_writing: while the model writes the text itself. prefix: token numbers. offload: hidden states lay on disk;
    replay: blocks ran anew for each site. disk: bytes while it runs; seconds, seconds_evaluating: estimated, of the compression and of measuring its
    result. servers: who runs the checkpoint as it was measured. notes: what the user should know."""

    recipe: Mapping[str, Any]
    model: str
    family: str
    blocks: int
    sites: Mapping[str, tuple[SiteFormat, ...]]
    bytes: Bytes
    bits_per_weight: float
    arithmetic: ArithmeticReport
    memory: Mapping[str, int]
    memory_evaluating: Mapping[str, int]
    memory_writing: Mapping[str, int] | None
    prefix: tuple[int, ...]
    offload: bool
    replay: bool
    disk: int
    seconds: float
    seconds_evaluating: float
    servers: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """A model on the text. nll: mean negative log-likelihood per token in nats; perplexity: exp of it. tokens: predictions made."""

    nll: float
    perplexity: float
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Both models on the same windows of a text, of length tokens each. kl: mean KL(base || quantized) per token in nats. agreement: share of tokens
    for which both find the same next one likeliest. seconds: that it took."""

    source: str
    windows: int
    length: int
    dtype: str
    seconds: float
    base: ScoreReport
    quantized: ScoreReport
    kl: float
    agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where it ran. versions: of Python and the libraries."""

    platform: str
    cpus: int | None
    threads: int
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressReport:
    """A finished compression. planish: the version that wrote this. finished: date and time, UTC. model: as given; model_sha256: its fingerprint.
    recipe_sha256: the recipe's digest. checkpoint: the folder. bits_per_weight: of quantized weights, scales and transforms included. evaluation:
    None if left out; gate: None if nothing was asked for. seconds: to compress, check and write, in the last run. peak_bytes: the most memory that
    the process held; device_peak_bytes: that it used on a GPU, None without one."""

    planish: str
    finished: str
    model: str
    model_sha256: str
    recipe_sha256: str
    checkpoint: str
    bytes: Bytes
    bits_per_weight: float
    evaluation: EvaluationReport | None
    gate: Judgement | None
    seconds: float
    peak_bytes: int
    device_peak_bytes: int | None = None
    machine: Machine
    blocks: tuple[BlockRecord, ...]
    plan: PlanReport
