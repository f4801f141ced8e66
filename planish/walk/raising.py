"""Which sites' activations get more bits: one pass over the full-precision model before the walk, and each site's error with few bits and with more.

Every site is looked at as it will be: with what the block's weights have absorbed, behind the transform that the recipe's steps make of it, with the
prefix. Only the activations are quantized, so that what is compared is theirs alone.

Shape suffixes: T tokens, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calib.compressed.packing import Packed
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.site_walk import SiteWalk, walking
from ..common.files import Kept
from ..quant.formats import Scheme
from ..quant.transforms import Keeping, RaiseActivations
from ..quant.transforms.factors import rounded
from ..quant.transforms.inputs import chain_of
from ..quant.transforms.raising import neediest
from ..quant.trial import output_error
from ..recipe.resolve import Address
from .block import BlockCompressor, Streams, Turn
from .flatten import HELD_OUT, chosen, look_at, trial_of
from .raising_check import candidates
from .records import BlockRecord
from .solving import Readers, settle

TOKENS = 4096  # of the calibration's, that the pass is made with at most, but one sample at least


@dataclass(frozen=True, slots=True)
class Need:
    """What a site's activations put its readers' outputs off by, relative: with `bits` as the scheme has them, and with `more`. raised: decided."""

    bits: int
    more: int
    error: float
    better: float
    raised: bool = False

    @property
    def words(self) -> str:
        """Why it was raised."""
        return f"activations raised to {self.more} bits: {self.bits} put its outputs off by {self.error:.1%}, {self.more} by {self.better:.1%}"


def few_samples(ids_NL: Tensor) -> int:
    """How many of the calibration's samples the pass is made with."""
    return max(1, min(len(ids_NL), TOKENS // ids_NL.shape[1]))


def decide(
    step: RaiseActivations, compressor: BlockCompressor, streams: Streams, packed: Mapping[Address, Packed | None], report: Callable[[int], None]
) -> dict[Address, Need]:
    """What is measured at every site that may be raised, and which are. The streams are at their end afterwards.

    streams: with `before`. report: told how many blocks are done.
    """
    sites = candidates(step, packed)
    errors: dict[Address, tuple[float, float]] = {}
    for index in range(compressor.runner.topology.block_count):
        errors |= _block(compressor, streams, index, {name: how for (block, name), how in sites.items() if block == index}, step.bits)
        report(index + 1)
    raised = neediest(errors, step.count(len(packed)))
    return {address: Need(_bits(sites[address]), step.bits, before, after, address in raised) for address, (before, after) in errors.items()}


def with_raised(packed: Mapping[Address, Packed | None], needs: Mapping[Address, Need]) -> dict[Address, Packed | None]:
    """How the sites are stored, once the decision is taken."""
    return {address: _raised(how, needs[address].more) if address in needs and needs[address].raised else how for address, how in packed.items()}


def needs_kept(needs: Mapping[Address, Need]) -> Kept:
    """For `needs_again`."""
    return [[block, site, asdict(need)] for (block, site), need in needs.items()], {}


def needs_again(kept: Sequence[tuple[int, str, dict[str, Any]]], _tensors: object) -> Mapping[Address, Need]:
    """As they were measured."""
    return {(block, site): Need(**need) for block, site, need in kept}


def noted(record: BlockRecord, needs: Mapping[Address, Need]) -> None:
    """Take down what was measured at the block's sites, and why some were raised."""
    for name, site in record.sites.items():
        need = needs.get((record.index, name))
        if need is not None:
            site.activation_errors = {f"int{need.bits}": need.error, f"int{need.more}": need.better}
            site.raised = need.raised
            site.note = "; ".join(filter(None, (site.note, need.words if need.raised else "")))


def summary(needs: Mapping[Address, Need]) -> str:
    """Which sites were raised, worst first."""
    raised = sorted((address for address, need in needs.items() if need.raised), key=lambda address: -needs[address].error)
    words = [f"{block}.{name} ({needs[block, name].error:.1%} to {needs[block, name].better:.1%})" for block, name in raised]
    return f"activations raised at {', '.join(words)}" if words else "activations are raised nowhere: more bits help at no site"


def _bits(how: Packed) -> int:
    assert how.scheme.activations is not None
    return how.scheme.activations.bits


def _raised(how: Packed | None, bits: int) -> Packed:
    assert how is not None
    assert how.scheme.activations is not None
    return Packed(Scheme(weights=how.scheme.weights, activations=replace(how.scheme.activations, bits=bits)), how.layout)


def _block(compressor: BlockCompressor, streams: Streams, index: int, sites: Mapping[str, Packed], bits: int) -> dict[Address, tuple[float, float]]:
    """The errors at these sites of block `index`, which the full-precision stream is past afterwards."""
    runner, turn = compressor.runner, Turn(compressor, index)
    with bfloat16_products(runner.dtype is torch.bfloat16):
        block = runner.load_block(index)
        try:
            turn.look(block, streams)
            assert streams.before is not None
            readers = {name: Readers.of(block, site, None, None, turn.stored) for name, site in turn.sites.items()}
            _as_it_runs(block, runner.dtype)
            passes = turn.passes(block, streams, streams.before)
            with walking(block, list(turn.sites.values()), passes, streams.replay, compressor.workers) as walk:
                found: dict[Address, tuple[float, float]] = {}
                for name, site in readers.items():
                    if name in sites:
                        site.packed = sites[name]
                        found[index, name] = _errors(turn, site, walk, bits)
                        site.packed = None
                    settle(site, walk, runner.dtype, torch.float32)
                return found
        finally:
            runner.release_block(index)


def _as_it_runs(block: nn.Module, dtype: torch.dtype) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)


def _errors(turn: Turn, readers: Readers, walk: SiteWalk, bits: int) -> tuple[float, float]:
    """With the site's activations as its scheme has them, and with so many bits."""
    steps, clip = turn.input_steps(readers.site.name)
    look = look_at(readers, walk, turn.observation.keep_T, HELD_OUT)
    trial = trial_of(look, clip, readers, turn.stored)
    with bfloat16_products(False):
        final, _ = chosen(steps, clip, readers, look, turn.stored)
        chain = rounded(chain_of(final, trial.fit), turn.stored)
        more = replace(trial, scheme=_raised(readers.packed, bits).scheme)
        kept = sum(step.kept(readers.width) for step in final if isinstance(step, Keeping))
        return output_error(chain, trial, kept, weights=False), output_error(chain, more, kept, weights=False)
