"""Outlier tokens, and the prefix that would hold them (Chen et al., "PrefixQuant: Eliminating Outliers by Prefixed Tokens", 2024, section 4).

A few tokens - the first one, and mostly some delimiter - have a maximum far above that of the others: they set the scale of a whole window's
activations. Where they stand as a prefix in full precision before every text, they do not appear in it again.

Shape suffixes: B samples of a batch, L positions, C channels of a site.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..walk.runner import BlockRunner
from ..walk.site_walk import site_inputs
from .diagnosis import OutlierToken, Prefix, Thresholds

LISTED = 32  # entries of a report
PROBE = 16  # samples in which a prefix is sought, at most


@dataclass(slots=True)
class _Seen:
    """One token. samples: where it was an outlier; initial: where it was one at position 0. ratio, site: of the largest."""

    samples: set[int] = field(default_factory=set)
    initial: set[int] = field(default_factory=set)
    inside: set[int] = field(default_factory=set)
    ratio: float = 0.0
    site: str = ""


class OutlierTokens:
    """What was seen of them so far. ids_NL: the tokens of all samples."""

    def __init__(self, ids_NL: Tensor, thresholds: Thresholds) -> None:
        self.ids_NL, self.thresholds = ids_NL, thresholds
        self._seen: dict[int, _Seen] = defaultdict(_Seen)
        self._counts: dict[str, int] = defaultdict(int)

    @torch.no_grad()
    def update(self, site: str, x_BLC: Tensor, first: int) -> None:
        """Take in a batch's input of one site ("11.down"). first: the number of its first sample."""
        peak_BL = torch.maximum(x_BLC.amax(2), -x_BLC.amin(2)).float()
        ratio_BL = peak_BL / peak_BL.median(1, keepdim=True).values
        beyond_BL = ratio_BL > self.thresholds.outlier_token  # where the median is 0, so are most tokens: nan and inf, and inf is one
        for sample, position in beyond_BL.nonzero().tolist():
            self._counts[site] += 1
            seen = self._seen[int(self.ids_NL[first + sample, position])]
            seen.samples.add(first + sample)
            (seen.inside if position else seen.initial).add(first + sample)
            if ratio_BL[sample, position] > seen.ratio:
                seen.ratio, seen.site = ratio_BL[sample, position].item(), site

    def tokens(self, text: Callable[[int], str]) -> tuple[OutlierToken, ...]:
        """The most frequent ones, at most LISTED, those with the larger ratio first where they are equally frequent. text: of a token id."""
        found = [
            OutlierToken(
                token_id=token,
                text=text(token),
                count=len(seen.samples),
                initial=len(seen.initial),
                inside=len(seen.inside),
                present=self._present(token),
                ratio=seen.ratio,
                site=seen.site,
            )
            for token, seen in self._seen.items()
        ]
        return tuple(sorted(found, key=lambda one: (-one.count, -one.ratio, one.token_id))[:LISTED])

    def prefix(self, text: Callable[[int], str], start: int | None) -> Prefix | None:
        """The suggested prefix: the most frequent outlier tokens, then the token that begins a text; None if there are no outliers.

        Its length is the mean number of outlier tokens in a sample at the worst site, rounded up. The first token of a sample is an outlier whichever
        it is, so only other positions count for a token, and there it must be one more often than not (prefix_share). start: the token that begins a
        text, None if the model has none.
        """
        if not self._counts:
            return None
        length = math.ceil(max(self._counts.values()) / len(self.ids_NL))
        share = self.thresholds.prefix_share
        often = [token for token, seen in self._seen.items() if seen.inside and len(seen.inside) > share * self._present(token)]
        often.sort(key=lambda token: (-len(self._seen[token].inside), token))
        chosen = [token for token in often if token != start][: length if start is None else length - 1]
        ids = tuple(chosen if start is None else [*chosen, start])
        return Prefix(token_ids=ids, text="".join(map(text, ids)), length=length) if ids else None

    def _present(self, token: int) -> int:
        """How many samples hold it beyond position 0."""
        return int((self.ids_NL[:, 1:] == token).any(1).sum())


@torch.no_grad()
def search_prefix(runner: BlockRunner, ids_NL: Tensor, text: Callable[[int], str], start: int | None, report: Callable[[int], None]) -> Prefix | None:
    """The prefix that `OutlierTokens` suggests, in a pass of its own over the first PROBE samples. report: told how many blocks are done."""
    ids_NL = ids_NL[:PROBE]
    seen, entered = OutlierTokens(ids_NL, Thresholds()), list(runner.start([sample_L[None] for sample_L in ids_NL]))
    stream = [hidden for hidden, _ in entered]
    for index in range(runner.topology.block_count):
        block = runner.load_block(index)
        try:
            with site_inputs(block, runner.topology.block(index).sites) as inputs:
                for sample, (_, call) in enumerate(entered):
                    stream[sample] = call.run(block, index, stream[sample])
                    for name, x_LC in inputs.take().items():
                        seen.update(f"{index}.{name}", x_LC[None], sample)
        finally:
            runner.release_block(index)
        report(index + 1)
    return seen.prefix(text, start)
