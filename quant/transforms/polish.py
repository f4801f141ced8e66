"""The step that polishes a block once its weights are codes: scales and clips are moved by descent, so that the block's output comes nearer to
that of the full-precision model: what errors of one site can make up for another's, no site sees alone.

Only numbers that a checkpoint holds anyway are moved, so nothing runs slower: the weights' scales (their codes stay) and the activations' clips,
as in OmniQuant's block-wise calibration (Shao et al. 2023, arXiv:2308.13137, section 3), but after the solver instead of in its place.
"""

from dataclasses import dataclass

from ..errors import PlanishError
from ..seeds import check_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Polish:
    """steps: of Adam, a batch each. lr: how far the first step moves a scale, as a part of it; it falls to 0 as a cosine. clip: move clips of
    dynamic activations too, which planish alone runs.

    held_out: the part of the batches by which what was learned is judged; the best that was met is kept, which may be the start.
    """

    steps: int = 48
    lr: float = 0.002
    clip: bool = True
    held_out: float = 0.25
    seed: int = 0
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_seed("polish.seed", self.seed)
        if self.steps < 1:
            raise PlanishError(f"polish.steps is {self.steps}, but it counts steps of descent, at least 1. Usual: 48.")
        if not 0 < self.lr <= 0.1:
            raise PlanishError(f"polish.lr is {self.lr}, but it is the part of a scale that a step moves it by, above 0, at most 0.1. Usual: 0.002.")
        if not 0 < self.held_out < 1:
            raise PlanishError(f"polish.held_out is {self.held_out}, but it is a part of the batches, above 0, below 1. Usual: 0.25.")
