"""The steps for what runs beside the codes: what a recipe says. How a low-rank path is found: low_rank.py; held-out weights: super_weight.py.

Shape suffixes: C channels, O out channels.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import PlanishError
from .factors import Chain
from .inputs import SiteView
from .subspace import reflected

Place = tuple[int, str, int, int]
"""Block, the linear layer's path in it, row (output channel), column (input channel) of a single weight."""


def _check_rank(name: str, rank: int) -> None:
    if rank < 1:
        raise PlanishError(f"{name}.rank is {rank}, but a side path has at least rank 1. Usual: 8 to 64.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lorc:
    """LoRC (ZeroQuant-V2): after the solver, the best `rank` of each reader's error W - Ŵ runs beside it, on the input before it is quantized.

    weighted: best for the outputs on the calibration text (LQER, QERA), else for the weight.
    """

    rank: int = 32
    weighted: bool = True
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        _check_rank("low_rank", self.rank)

    @property
    def needs_moments(self) -> bool:
        """Whether it looks at inputs."""
        return self.weighted

    def side_bits(self, out_channels: int, channels: int, wide: int) -> int:
        """What it adds to a layer in the checkpoint, in bits, a number of full precision having `wide` of them."""
        return self.rank * (out_channels + channels) * wide


@dataclass(frozen=True, kw_only=True, slots=True)
class Svdquant:
    """SVDQuant: before the solver, each reader gives `rank` directions to a side path, chosen so that the rest loses least when rounded to nearest.

    rounds: how often the path is improved at most, see low_rank.svdquant.
    """

    rank: int = 32
    rounds: int = 5
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        _check_rank("svdquant", self.rank)
        if self.rounds < 0:
            raise PlanishError(f"svdquant.rounds is {self.rounds}, but it counts improvements of the path: 0 for none, 100 as in the paper.")

    @property
    def needs_moments(self) -> bool:
        """Whether it looks at inputs."""
        return True

    def side_bits(self, out_channels: int, channels: int, wide: int) -> int:
        """As of Lorc."""
        return self.rank * (out_channels + channels) * wide


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperWeights:
    """Super weights held out (super_weight.py): taken out before anything is transformed, and run beside the layer.

    places: of each [block, path, row, column], such as [2, mlp.down_proj, 12, 34]; auto: those that super_weights.py finds, in a pass of its own over
    the model. z: what remains of a weight is clipped at mean + z * std; null: not.
    """

    places: Literal["auto"] | tuple[Place, ...] = "auto"
    z: float | None = None
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.z is not None and not self.z > 0:
            raise PlanishError(f"super_weight.z is {self.z}, but it counts the standard deviations of a weight to keep, above 0. Usual: 9 to 20.")
        if not self.places and self.z is None:
            raise PlanishError("super_weight: no places and no z, so nothing would be done. Give places, auto or z.")

    @property
    def needs_moments(self) -> bool:
        """Whether it looks at inputs at the layer; auto is resolved before."""
        return False

    def side_bits(self, out_channels: int, channels: int, wide: int) -> int:
        """None to speak of: a model has a handful of super weights, each a path of rank 1."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quad:
    """QUAD (subspace.py): the principal subspace of `rank` directions in full precision, weights and input; one for each site."""

    bits: ClassVar[None] = None

    rank: int = 64
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        _check_rank("quad", self.rank)

    def kept(self, width: int) -> int:
        """rank, whatever the width."""
        return self.rank

    def chain(self, view: SiteView) -> Chain:
        """The reflection, and what mixes channels inside both parts."""
        return reflected(view.second_CC, self.kept(len(view.second_CC)))

    def side_bits(self, out_channels: int, channels: int, wide: int) -> int:
        """As of Lorc."""
        return self.rank * out_channels * wide


@dataclass(frozen=True, kw_only=True, slots=True)
class Resq:
    """ResQ (subspace.py): the principal subspace in codes of `bits` bits, weights per channel, input per token. share: of the site's channels."""

    share: float = 0.125
    bits: int = 8
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise PlanishError(f"resq.share is {self.share}, but it is a part of a site's channels, between 0 and 1. Usual: 0.125.")
        if not 2 <= self.bits <= 8:
            raise PlanishError(f"resq.bits is {self.bits}, but integer formats have 2 to 8 bits. Usual: 8.")

    def kept(self, width: int) -> int:
        """The share in whole channels, at least one."""
        return max(1, round(self.share * width))

    def chain(self, view: SiteView) -> Chain:
        """The reflection, and what mixes channels inside both parts."""
        return reflected(view.second_CC, self.kept(len(view.second_CC)))

    def side_bits(self, out_channels: int, channels: int, wide: int) -> int:
        """As of Lorc: codes, and a scale for each row."""
        return out_channels * (self.kept(channels) * self.bits + wide)
