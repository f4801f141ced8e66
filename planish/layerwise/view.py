"""A compressed checkpoint seen site by site: errors where they arise, and what the whole model would gain if one site stayed in full precision.

Two passes over the blocks, one in memory at a time: the first measures errors, the second lets a stream go on from each of the sites chosen with that
site in full precision, so that restoring a site of block i costs only the blocks from i on.

Shapes: ids (N, L) windows of token numbers.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..calib.blocks.sites import Site
from ..calib.compressed.packing import Packed
from ..calib.compressed.side import kept_formats
from ..calib.compressed.stored import StoredCheckpoint, open_stored
from ..calib.machine.device import pick_device
from ..calib.walk.observe import sinks
from ..calib.walk.runner import BlockRunner
from ..calib.walk.site_walk import site_inputs
from ..compressing.absorbed import AbsorbedBlocks
from ..compressing.reporting import described
from ..eval.scores.layers import LayerView, SiteErrors, SiteView, chosen_sites
from ..eval.scores.score import Comparison, arithmetic, stream_comparisons
from ..eval.scores.variants import Key, Variants
from ..eval.verifying.verify import evaluation_windows
from ..quant.errors import PlanishError
from ..quant.formats import ActivationFormat
from ..walk.callbacks import Progress, Silent
from .twin import check_start, check_twin, twin_of

Inputs = Literal["base", "quantized"]


def layers(
    checkpoint: str | Path,
    against: str | Path,
    *,
    text: str = "builtin",
    windows: int = 2,
    length: int = 512,
    inputs: Inputs = "base",
    sites: int | None = 12,
    evenly: bool = False,
    device: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> LayerView:
    """Where a compressed checkpoint loses what it loses.

    against: the model that was compressed. text, windows, length: as of verify. inputs: whose inputs errors are measured on: the original's, so that
    each site's error is its own, or those of the quantized model as it runs. sites: of how many the effect on the whole is measured, None: of all;
    those with the largest error, or evenly spaced ones. Raises PlanishError: arguments that cannot be used; a model that was not compressed to this.
    """
    start, progress = time.monotonic(), progress or Silent()
    if inputs not in get_args(Inputs):
        raise PlanishError(f"inputs is {inputs!r}, but errors are measured on the inputs of base or quantized.")
    if sites is not None and sites < 0:
        raise PlanishError(f"sites is {sites}, but it counts the sites to restore, from 0 on.")
    if sites is None and evenly:
        raise PlanishError("evenly chooses among the sites, but all are to be restored. Leave out one of --evenly and --all-sites.")
    stored, where = open_stored(checkpoint), pick_device(device)
    ids_NL = evaluation_windows(stored, text, windows, length)
    batches = list(torch.split(ids_NL, 1))
    twin = partial(twin_of, stored, against, where, allow_pickle=allow_pickle)
    with arithmetic(torch.float32), tempfile.TemporaryDirectory(prefix="planish-layers-") as kept:
        found, ends = _errors(stored, twin(progress=progress, kept=Path(kept)), batches, inputs, progress)
        chosen = chosen_sites(found, sites, evenly)
        again = twin(progress=Silent(), kept=Path(kept)) if chosen else None
        restored = _restored(stored, again, batches, chosen, ends, progress)
    return LayerView(
        checkpoint=str(checkpoint),
        model=str(against),
        text=text,
        windows=ids_NL.shape[0],
        length=ids_NL.shape[1],
        inputs=inputs,
        whole=restored[None],
        sites=tuple(replace(site, restored=restored.get(site.name)) for site in found),
        seconds=time.monotonic() - start,
    )


def _errors(
    stored: StoredCheckpoint, twin: AbsorbedBlocks, batches: Sequence[Tensor], inputs: Inputs, progress: Progress
) -> tuple[list[SiteView], list[Tensor]]:
    """The errors at every quantized site, and what the twin ends in."""
    runner = BlockRunner(stored, torch.float32, twin.runner.device)
    base, quantized = Variants.start(runner, batches), Variants.start(runner, batches)
    known, views = runner.topology, []
    check_start(twin, batches[0], base.plain[0])
    progress.stage("errors", known.block_count)
    for index in range(known.block_count):
        block = runner.load_block(index)
        with twin.block(index, torch.float32) as (full, _turn):
            mine = known.block(index)
            check_twin(full, block, mine, runner.block_name(index))
            packed = {site.name: stored.packed.get(f"{runner.block_name(index)}.{site.readers[0]}") for site in mine.sites}
            sites = [site for site in mine.sites if packed[site.name] is not None]
            sums = {site.name: SiteErrors() for site in sites}
            shown, hidden = (full, base) if inputs == "base" else (block, quantized)
            for batch, call in enumerate(hidden.calls):
                with site_inputs(shown, sites) as seen:
                    out = call.run(shown, index, hidden.plain[batch])
                taken, keep_T = seen.take() if sites else {}, _ordinary(twin, hidden.plain[batch], out)
                for site in sites:
                    sums[site.name].add(full, block, site, taken[site.name][keep_T], _kept(stored, index, site, packed[site.name]))
            base.advance(full, index, {})
            quantized.advance(block, index, {})
        runner.release_block(index)
        views += [_view(index, site, packed[site.name], sums[site.name]) for site in sites]
        progress.step(index + 1)
    return views, base.plain


def _ordinary(twin: AbsorbedBlocks, hidden: Tensor, out: Tensor) -> Tensor:
    """The tokens that are no sinks: (T,) bool. All of them if they all were."""
    original = twin.runner.checkpoint.original_stream
    keep_T = ~sinks(original(hidden).flatten(0, 1), original(out).flatten(0, 1))
    return keep_T if bool(keep_T.any()) else torch.ones_like(keep_T)


def _kept(stored: StoredCheckpoint, index: int, site: Site, packed: Packed | None) -> ActivationFormat | None:
    """How the input's channels that the codes leave out are quantized."""
    said = stored.extension.sites.get(f"{index}.{site.name}")
    return None if said is None or said.kept_bits is None or packed is None else kept_formats(said.kept_bits, packed.scheme)[1]


def _view(index: int, site: Site, packed: Packed | None, sums: SiteErrors) -> SiteView:
    assert packed is not None
    alone = None if packed.scheme.activations is None else sums.relative("activations")
    words = described(packed)
    return SiteView(
        block=index,
        site=site.name,
        format=", ".join(filter(None, (words["weights"], words["activations"] and f"activations {words['activations']}"))),
        error=sums.relative("both"),
        weights=sums.relative("weights"),
        activations=alone,
    )


def _restored(
    stored: StoredCheckpoint,
    twin: AbsorbedBlocks | None,
    batches: Sequence[Tensor],
    chosen: Sequence[SiteView],
    ends: Sequence[Tensor],
    progress: Progress,
) -> dict[str | None, Comparison]:
    """The twin's ends beside those of the checkpoint (None), and of the checkpoint with each chosen site in full precision, by the site's name."""
    runner = BlockRunner(stored, torch.float32, torch.device("cpu") if twin is None else twin.runner.device)
    known, variants = runner.topology, Variants.start(runner, batches)
    progress.stage("restoring sites", known.block_count)
    for index in range(known.block_count):
        names = [site.site for site in chosen if site.block == index]
        block = runner.load_block(index)
        if twin is not None and (names or twin.streams is not None):
            with twin.block(index, torch.float32) as (full, _turn):
                variants.advance(block, index, _changes(full, index, [site for site in known.block(index).sites if site.name in names]))
        else:
            variants.advance(block, index, {})
        runner.release_block(index)
        progress.step(index + 1)
    streams = [variants.plain, *variants.streams.values()]
    names_of: list[str | None] = [None, *(f"{block}.{site}" for block, site, _ in variants.streams)]
    return dict(zip(names_of, stream_comparisons(runner, runner, batches, ends, streams), strict=True))


def _changes(full: nn.Module, index: int, sites: Sequence[Site]) -> dict[Key, dict[str, nn.Module]]:
    return {(index, site.name, "full"): {path: full.get_submodule(path) for path in site.readers} for site in sites}
