"""What a compression takes down of each block and site: for the journal, the manifest and the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..calib.compressed.extension import SiteInput
from ..quant.formats import QuantizedWeight
from ..quant.solvers import Solution
from ..quant.transforms import Smooth
from ..quant.transforms.auto import Choice
from .smoothing import Scaling
from .solving import Readers


@dataclass(slots=True)
class SiteRecord:
    """What happened at one site.

    error: of the readers' output, relative; None where nothing was quantized or no data was seen. strength: of smoothing, exponent: of scale_rms;
    None if not scaled so. tried: the block's error with each one tried. made_dynamic: a static range was given up, note says why.
    clip: of its dynamic activations; chain: what its input goes through at run time, as factors.store describes it. kept, kept_bits, ranks: as of
    SiteInput. chosen: what auto took; candidates: the error of each one, of the readers' outputs on held-out tokens.
    activation_errors: what the activations alone put the outputs off by, by their format, where raise_activations looked; raised: whether it gave
    them more bits. settings: of the solver, where held-out text chose them; judged: as of search.Choice, by candidate.
    """

    error: float | None = None
    damping: float = 0.0
    repairs: int = 0
    strength: float | None = None
    exponent: float | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    made_dynamic: bool = False
    note: str = ""
    clip: float = 1.0
    chain: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0
    kept_bits: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    judged: Mapping[str, float] = field(default_factory=dict)
    chosen: str | None = None
    candidates: Mapping[str, float] = field(default_factory=dict)
    activation_errors: Mapping[str, float] = field(default_factory=dict)
    raised: bool = False

    @property
    def site_input(self) -> SiteInput:
        """What a checkpoint says of it."""
        return SiteInput(self.clip, tuple(self.chain), self.kept, self.kept_bits, self.ranks)

    def note_solution(self, solution: Solution, error: float) -> None:
        """What the solver did."""
        self.error, self.damping, self.repairs = error, solution.damping, solution.repairs
        self.settings, self.judged = solution.settings, solution.judged

    def note_beside(self, readers: Readers) -> None:
        """Take down what runs beside the codes."""
        self.kept, self.ranks = readers.kept_channels, {path: low.rank for path, low in readers.low.items()}
        self.kept_bits = next((kept.weight.format.bits for kept in readers.kept.values() if isinstance(kept.weight, QuantizedWeight)), None)

    def note_choice(self, choice: Choice) -> None:
        """What auto chose."""
        self.chosen, self.candidates = choice.names[choice.chosen], dict(zip(choice.names, choice.errors, strict=True))

    def note_scale(self, scaling: Scaling) -> None:
        """What was decided of the site's scale."""
        if isinstance(scaling.step, Smooth):
            self.strength = scaling.setting
        else:
            self.exponent = scaling.setting
        self.tried = scaling.tried


@dataclass(slots=True)
class BlockRecord:
    """What happened in one block. error: its quantized output against the full-precision one, relative, sink tokens left out.

    polished: that error on the batches held out, before polish and after.
    """

    index: int
    error: float | None = None
    sink_tokens: int = 0
    equivalence: float = 0.0
    polished: list[float] | None = None
    sites: dict[str, SiteRecord] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "BlockRecord":
        """The record that dataclasses.asdict made this of."""
        return cls(**{**data, "sites": {name: SiteRecord(**site) for name, site in data["sites"].items()}})
