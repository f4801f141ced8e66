"""A checkpoint whose weights have taken in what concerns the whole residual stream: it computes what the original does, in another basis.

Whoever loads a module of it gets the rewritten weights, so walk, statistics and solvers see an ordinary model. Blocks are rewritten in float32, for
they are rounded later; all else is rounded to its stored dtype, as the new checkpoint will have it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...quant.errors import PlanishError
from ...quant.transforms.factors import Blocks, Chain, placed
from ...quant.transforms.rotate import turned_back
from ..blocks.fusing import (
    Folded,
    StreamMap,
    fold_norms,
    head_rows,
    map_stream,
    norm_readers,
    norm_through,
    read_through,
    rotate_values,
    write_through,
)
from ..blocks.sites import Topology
from ..blocks.topology import topology
from .checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rewriting:
    """What is absorbed. fold: norms go into their readers. untie: the head gets its own weights. residual, value: orthogonal matrices of the residual
    stream (needs fold) and of one head's values, the same for all; empty for none. own_values: instead of value, (kv heads, E, E) for each block."""

    fold: bool = False
    untie: bool = False
    residual: Chain = ()
    value: Chain = ()
    own_values: tuple[Tensor, ...] = ()

    def parts(self) -> Iterator[tuple[str, "Rewriting"]]:
        """Growing from nothing to all of it, each with the step that came last."""
        if self.fold:
            yield "fold_norms", Rewriting(fold=True, untie=self.untie)
        if self.residual:
            yield "rotate at residual", replace(self, value=(), own_values=())
        if self.value or self.own_values:
            yield "rotate at value", self

    def value_turns(self, block: int, kv_heads: int) -> list[Chain]:
        """What each key-value head's values are turned by in a block; empty for none."""
        if self.own_values:
            return [(Blocks(turn_EE[None]),) for turn_EE in self.own_values[block]]
        return [self.value] * kv_heads if self.value else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten(Checkpoint):
    """The rewritten checkpoint. exact: what is outside the blocks is in float32 too, and nothing is rounded."""

    rewriting: Rewriting = field(repr=False)
    exact: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, rewriting: Rewriting, *, exact: bool = False) -> "Rewritten":
        """The checkpoint with this done to it. Raises PlanishError where it cannot be."""
        known = topology(checkpoint.config)
        check(known, checkpoint, rewriting)
        values = {part.name: getattr(checkpoint, part.name) for part in fields(Checkpoint)}
        if checkpoint.tied and unties(known, checkpoint, rewriting):
            config = copy.deepcopy(checkpoint.config)
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            own = {name: checkpoint.tensors[source] for name, source in checkpoint.aliases.items()}
            values |= {"config": config, "aliases": {}, "tensors": dict(sorted({**checkpoint.tensors, **own}.items()))}
        return cls(**values, rewriting=rewriting, exact=exact)

    @property
    def stream_map(self) -> StreamMap:
        """What the residual stream goes through."""
        return _stream_map(topology(self.config), self.rewriting)

    def original_stream(self, hidden: Tensor) -> Tensor:
        """The residual stream in its own basis again: there massive activations stand out. Without its mean where that was taken away."""
        return turned_back(_there(self.rewriting.residual, hidden.device), hidden)

    @torch.no_grad()
    def load_module(self, module: nn.Module, prefix: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """As of any checkpoint, rewritten. prefix: a block's, or that of a module outside the blocks."""
        known = topology(self.config)
        block = prefix.startswith(known.blocks + ".")
        Checkpoint.load_module(self, module, prefix, dtype=torch.float32 if block or self.exact else None, device=device)
        if block:
            self._rewrite_block(module, known, prefix)
        else:
            self._rewrite_outer(module, known, prefix)
        final = dtype or (self.dtype if block else None)
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = nn.Parameter(parameter.to(final), requires_grad=False)

    def _rewrite_block(self, block: nn.Module, known: Topology, name: str) -> None:
        index = int(name.removeprefix(f"{known.blocks}."))
        mine = known.block(index)
        if self.rewriting.fold:
            fold_norms(block, mine, name)
        if change := _stream_map(known, self.rewriting):
            map_stream(block, mine, change)
        if turns := self.rewriting.value_turns(index, len(head_rows(mine))):
            rotate_values(block, mine, turns)

    def _rewrite_outer(self, module: nn.Module, known: Topology, name: str) -> None:
        change = _stream_map(known, self.rewriting)
        if name in (*known.embeddings, *known.images) and change:
            write_through(module, change)
        if name == known.norm and self.rewriting.fold and (folded := self._last_norm(known)):
            folded.into_norm(module, known.norm_offset)
            norm_through(module, change.rotation)
        if name == known.last_reader:
            if self.rewriting.fold and (folded := self._last_norm(known)):
                folded.into_reader(module)
            if change.rotation:
                read_through([module], change.rotation)

    def _last_norm(self, known: Topology) -> Folded | None:
        return fold_of(self, known, known.norm, [known.last_reader]) if known.norm and known.last_reader else None


def changed(known: Topology, rewriting: Rewriting) -> tuple[str, ...]:
    """The modules outside the blocks whose weights become others."""
    names: list[str | None] = []
    if _stream_map(known, rewriting):
        names += (*known.embeddings, *known.images)
    if rewriting.fold:
        names += [known.norm]
    if rewriting.fold or rewriting.residual:
        names += [known.last_reader]
    return tuple(name for name in names if name)


def unties(known: Topology, checkpoint: Checkpoint, rewriting: Rewriting) -> bool:
    """Whether tied weights are to become two: because that is asked for, or because one of them becomes another."""
    names = {name.rpartition(".")[0] for pair in checkpoint.aliases.items() for name in pair}
    return rewriting.untie or bool(names & set(changed(known, rewriting)))


def check(known: Topology, checkpoint: Checkpoint, rewriting: Rewriting) -> None:
    """PlanishError where the architecture or the weights do not allow it."""
    where = f"{checkpoint.path}: {known.family}"
    if (rewriting.fold or rewriting.residual) and not all(kind.stream_readers for kind in known.kinds):
        step = "fold_norms" if rewriting.fold else "rotate at residual"
        raise PlanishError(f"{where}: {step}: the residual stream itself is normalised after every layer: no norm stands before its readers alone.")
    inside = {reader for kind in known.kinds for site in kind.sites for reader in site.readers}
    posts = dict.fromkeys(path for kind in known.kinds for path in kind.writers if path not in inside)
    if known.body and not known.images and (rewriting.residual or (rewriting.fold and known.norm_kind == "layer")):
        step = "rotate at residual" if rewriting.residual else "fold_norms"
        raise PlanishError(
            f"{where}: {step}: embeddings of images enter the stream beside those of tokens, and not all come from linear layers. "
            "Leave the step out; rotate at value, and steps at inputs, work."
        )
    if rewriting.residual and posts:
        raise PlanishError(
            f"{where}: rotate at residual: norms stand behind the layers that write to the stream ({', '.join(posts)}), and their weights multiply "
            "channel by channel, which does not commute with a rotation. Leave the step out; rotate at value, and steps at inputs, work."
        )
    if rewriting.fold:
        for index in range(known.block_count):
            for path, readers in norm_readers(known.block(index)).items():
                name = known.block_name(index)
                fold_of(checkpoint, known, f"{name}.{path}", [f"{name}.{reader}" for reader in readers])
        if known.norm and known.last_reader:
            fold_of(checkpoint, known, known.norm, [known.last_reader])


def fold_of(checkpoint: Checkpoint, known: Topology, norm: str, readers: Sequence[str]) -> Folded | None:
    """A norm of the original, on its way into these readers; None for one without weights. All by full names. PlanishError as of Folded.of."""
    if f"{norm}.weight" not in checkpoint.tensors:
        return None
    parameters = checkpoint.read(name for name in (f"{norm}.weight", f"{norm}.bias") if name in checkpoint.tensors)
    takes_bias = all(f"{reader}.bias" in checkpoint.tensors for reader in readers)
    return Folded.of(parameters[f"{norm}.weight"], parameters.get(f"{norm}.bias"), known.norm_offset, takes_bias, norm)


def _stream_map(known: Topology, rewriting: Rewriting) -> StreamMap:
    """The mean may go only where every reader of the stream is a norm that takes it away: none reads the stream bare at the end."""
    return StreamMap(rewriting.fold and known.norm_kind == "layer" and known.norm is not None, rewriting.residual)


@lru_cache(maxsize=1)
def _there(rotation: Chain, device: torch.device) -> Chain:
    """On the device, once for all batches: a dense rotation is up to 537 MB."""
    return placed(rotation, device)
