"""How hard a site's input is to quantize: tail, channels and tokens, of ordinary tokens and of all.

One pass over the data, in pieces that stay in the processor's cache. The channels' measure is that of "Turning LLM Activations
Quantization-Friendly" (2025), section 3; sources of the others stand at diagnosis.Figures.

Shape suffixes: T tokens, C channels.
"""

import torch
from torch import Tensor

from ...quant.errors import PlanishError
from ...quant.pieces import pieces
from .diagnosis import Figures

BINS = 256


def binned(values_C: Tensor, bins: int = BINS) -> tuple[float, ...]:
    """The largest value of each bin of neighbouring channels: at most `bins`. values_C: (C,), not negative.

    Bin i begins at channel i * ceil(C / bins); the last may be narrower.
    """
    width = max(1, -(-len(values_C) // bins))
    padded = torch.nn.functional.pad(values_C.float(), (0, -len(values_C) % width))
    return tuple(padded.view(-1, width).amax(1).tolist())


class Tally:
    """Sums and maxima of some tokens. absmax_C: float32; square_C, fourth_C: sums of x^2 and x^4 in float64; maxima_T: each token's largest |x|."""

    def __init__(self, channel_count: int, device: torch.device | None = None) -> None:
        self.absmax_C = torch.zeros(channel_count, device=device)
        self.square_C = torch.zeros(channel_count, dtype=torch.float64, device=device)
        self.fourth_C = torch.zeros(channel_count, dtype=torch.float64, device=device)
        self._maxima: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """How many tokens were taken in."""
        return sum(map(len, self._maxima))

    @property
    def maxima_T(self) -> Tensor:
        """The largest |x| of each token, in the order in which they came: (T,) float32, 4 bytes a token."""
        self._maxima = [torch.cat(self._maxima)] if self._maxima else [self.absmax_C.new_empty(0)]
        return self._maxima[0]

    def add(self, x_TC: Tensor) -> None:
        """Take in tokens: (T, C) of any float type. Powers are taken, and summed over one call, in float32."""
        if not len(x_TC):
            return
        x_TC = x_TC.float().abs()
        self.absmax_C = torch.maximum(self.absmax_C, x_TC.amax(0))
        self._maxima.append(x_TC.amax(1))
        self.square_C += x_TC.square_().sum(0)
        self.fourth_C += x_TC.square_().sum(0)

    def merge(self, other: "Tally") -> None:
        """Take in what another one has seen, which may lie on another device."""
        device = self.absmax_C.device
        self.absmax_C = torch.maximum(self.absmax_C, other.absmax_C.to(device))
        self.square_C += other.square_C.to(device)
        self.fourth_C += other.fourth_C.to(device)
        self._maxima.append(other.maxima_T.to(device))

    def figures(self) -> Figures:
        """See diagnosis.Figures; at least one token. Tokens that are all zero do not count for the median; where all are, the figures are 0."""
        tokens, largest = self.tokens, self.absmax_C.amax().item()
        if not largest:
            return Figures(absmax=0.0, kurtosis=0.0, crest=0.0, difficulty=0.0, token_ratio=0.0)
        second_C = self.square_C / tokens
        second = second_C.mean().item()
        median = self.maxima_T[self.maxima_T > 0].median().item()
        return Figures(
            absmax=largest,
            kurtosis=(self.fourth_C / tokens).mean().item() / second**2,
            crest=largest / second**0.5,
            difficulty=second_C.sqrt().std(correction=0).item(),
            token_ratio=largest / median,
        )


class Difficulty:
    """The figures of one site's input x (T, C): ordinary tokens and sinks are told apart. name: the site, for messages."""

    def __init__(self, channel_count: int, name: str = "a site") -> None:
        self.name = name
        self.ordinary_tokens, self.sinks = Tally(channel_count), Tally(channel_count)

    @torch.no_grad()
    def update(self, x_TC: Tensor, keep_T: Tensor | None = None) -> None:
        """Take in x: (T, C) of any float type. keep_T: bool, False for the sink tokens; None: there are none.

        Raises PlanishError, with nothing taken in, if a value is not finite or its fourth power is too large for float32.
        """
        seen, sinks = Tally(x_TC.shape[1], x_TC.device), Tally(x_TC.shape[1], x_TC.device)
        for rows in pieces(x_TC):
            piece_TC = x_TC[rows]
            if keep_T is None or bool((keep := keep_T[rows]).all()):
                seen.add(piece_TC)
            else:
                seen.add(piece_TC[keep])
                sinks.add(piece_TC[~keep])
        self._check_finite(seen.fourth_C + sinks.fourth_C)
        self.ordinary_tokens.merge(seen)
        self.sinks.merge(sinks)

    def merge(self, other: "Difficulty") -> None:
        """Take in what another one has seen."""
        self.ordinary_tokens.merge(other.ordinary_tokens)
        self.sinks.merge(other.sinks)

    @property
    def sink_tokens(self) -> int:
        """How many tokens were sinks."""
        return self.sinks.tokens

    @property
    def ordinary(self) -> Figures:
        """The figures without the sink tokens. Raises PlanishError if nothing is left."""
        if not self.ordinary_tokens.tokens:
            raise PlanishError(f"Figures of {self.name}: not one token that is no sink was seen. Give more calibration text.")
        return self.ordinary_tokens.figures()

    @property
    def every(self) -> Figures:
        """The figures of all tokens. Raises PlanishError if none was seen."""
        whole = Tally(len(self.sinks.absmax_C))
        whole.merge(self.ordinary_tokens)
        whole.merge(self.sinks)
        if not whole.tokens:
            raise PlanishError(f"Figures of {self.name}: not one token was seen. Give more calibration text.")
        return whole.figures()

    def channel_absmax(self, bins: int = BINS) -> tuple[float, ...]:
        """The largest |x| of ordinary tokens in each bin of neighbouring channels, see binned."""
        return binned(self.ordinary_tokens.absmax_C, bins)

    def _check_finite(self, fourth_C: Tensor) -> None:
        bad_C = ~torch.isfinite(fourth_C)
        if bool(bad_C.any()):
            where = ", ".join(map(str, bad_C.nonzero()[:4, 0].tolist()))
            raise PlanishError(
                f"The input of {self.name} is not finite in {int(bad_C.sum())} of {len(bad_C)} channels (first: {where}), or too large for figures "
                "of its tail. Run the model in bfloat16 or float32, and check its weights."
            )
