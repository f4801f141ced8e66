"""Transforms absorbed by the weights of a module, in place: folded norms, a rotated residual stream, rotated heads, another order of channels.

(QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, section 3.2 for LayerNorm.)
All is computed in float64, piece by piece, and rounded once to the weights' dtype.

Shape suffixes: N rows of a piece, D width of the stream, C channels of a site, O and I out and in channels of one layer, A heads of E channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...quant.errors import PlanishError
from ...quant.transforms.factors import Chain, on_input, placed
from .sites import BlockTopology, Site, reader_bias, reader_weight

PIECE = 1 << 22  # values that are in float64 at a time


def rowwise(rows_ND: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Every row, as float64, becomes what `change` makes of it; in place, also in a transposed view."""
    step = max(1, PIECE // rows_ND.shape[1])
    for start in range(0, len(rows_ND), step):
        piece_ND = rows_ND[start : start + step]
        piece_ND.copy_(change(piece_ND.double()))


@dataclass(frozen=True, slots=True, eq=False)
class StreamMap:
    """What becomes of the residual stream: x -> (x - mean x) Q, the mean taken only if `center`. rotation: orthogonal."""

    center: bool = False
    rotation: Chain = ()

    def __bool__(self) -> bool:
        return self.center or bool(self.rotation)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) in x's dtype."""
        x = x - x.mean(-1, keepdim=True) if self.center else x
        return on_input(placed(self.rotation, x.device), x)


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A norm's weight and bias on their way into its readers: n gain + bias = (n + rest) gain + moved, n what is normed. All (D,) float64.

    gain: what the norm multiplied by. moved: what goes to the readers' biases. rest: the norm's new bias. Both None for a norm without a bias.
    """

    gain_D: Tensor
    moved_D: Tensor | None
    rest_D: Tensor | None

    @classmethod
    def of(cls, weight_D: Tensor, bias_D: Tensor | None, offset: float, takes_bias: bool, where: str) -> "Folded":
        """takes_bias: whether all readers have biases. PlanishError at `where`: the bias has nowhere to go."""
        gain_D = weight_D.double() + offset
        if bias_D is None:
            return cls(gain_D, None, None)
        bias_D = bias_D.double()
        if takes_bias:
            return cls(gain_D, bias_D, torch.zeros_like(bias_D))
        lost_D = (gain_D == 0) & (bias_D != 0)
        if bool(lost_D.any()):
            raise PlanishError(
                f"fold_norms: {where}: its weight is 0 in {int(lost_D.sum())} channels where its bias is not, and what reads it has no bias to "
                "take that over. Leave fold_norms out for this model."
            )
        return cls(gain_D, torch.zeros_like(bias_D), torch.where(bias_D == 0, 0.0, bias_D / gain_D))

    def into_norm(self, norm: nn.Module, offset: float) -> None:
        """The norm multiplies by 1."""
        parameters = dict(norm.named_parameters(recurse=False))
        parameters["weight"].fill_(1 - offset)
        if self.rest_D is not None:
            parameters["bias"].copy_(self.rest_D)

    def into_reader(self, reader: nn.Module) -> None:
        """The layer takes the gain, and what was moved."""
        weight_OD, bias_O = reader_weight(reader), reader_bias(reader)
        gain_D = self.gain_D.to(weight_OD.device)
        if bias_O is not None and self.moved_D is not None:
            rows, moved_D = max(1, PIECE // weight_OD.shape[1]), self.moved_D.to(weight_OD.device)
            moved_O = torch.cat([weight_OD[start : start + rows].double() @ moved_D for start in range(0, len(weight_OD), rows)])
            bias_O.copy_(bias_O.double() + moved_O)
        rowwise(weight_OD, lambda rows_ND: rows_ND * gain_D)


def norm_readers(topology: BlockTopology) -> dict[str, list[str]]:
    """The norms of a block that have weights, each with what reads it."""
    found: dict[str, list[str]] = {}
    for site in topology.sites:
        if site.host is not None and site.host.kind == "norm":
            found.setdefault(site.host.module, []).extend(site.all_readers)
    return found


def fold_norms(block: nn.Module, topology: BlockTopology, name: str) -> None:
    """Every norm of the block goes into its readers."""
    for path, readers in norm_readers(topology).items():
        norm, layers = block.get_submodule(path), [block.get_submodule(reader) for reader in readers]
        parameters = dict(norm.named_parameters(recurse=False))
        takes_bias = all(reader_bias(layer) is not None for layer in layers)
        folded = Folded.of(parameters["weight"], parameters.get("bias"), topology.norm_offset, takes_bias, f"{name}.{path}")
        folded.into_norm(norm, topology.norm_offset)
        for layer in layers:
            folded.into_reader(layer)


def map_stream(block: nn.Module, topology: BlockTopology, change: StreamMap) -> None:
    """The block's stream becomes change(stream): its writers write that, its readers, behind folded norms, read it."""
    for path in topology.writers:
        write_through(block.get_submodule(path), change)
    for site in topology.sites:
        if site.stream and change.rotation:
            read_through(map(block.get_submodule, site.all_readers), change.rotation)
    for path in norm_readers(topology):
        norm_through(block.get_submodule(path), change.rotation)


def write_through(writer: nn.Module, change: StreamMap) -> None:
    """What the layer or the table of embeddings puts out becomes change(that)."""
    weight_ND = writer.weight if isinstance(writer, nn.Embedding) else reader_weight(writer).T
    change = replace(change, rotation=placed(change.rotation, weight_ND.device))  # once, not with every piece
    rowwise(weight_ND, change)
    bias_D = None if isinstance(writer, nn.Embedding) else reader_bias(writer)
    if bias_D is not None:
        rowwise(bias_D[None], change)


def read_through(readers: Iterable[nn.Module], rotation: Chain) -> None:
    """The layers read the stream in the rotated basis."""
    for reader in readers:
        weight_OD = reader_weight(reader)
        rowwise(weight_OD, _through(rotation, weight_OD.device))


def norm_through(norm: nn.Module, rotation: Chain) -> None:
    """A norm that multiplies by 1 adds its bias in the rotated basis."""
    bias_D = dict(norm.named_parameters(recurse=False)).get("bias")
    if bias_D is not None and rotation:
        rowwise(bias_D[None], _through(rotation, bias_D.device))


def _through(rotation: Chain, device: torch.device) -> Callable[[Tensor], Tensor]:
    there = placed(rotation, device)
    return lambda x: on_input(there, x)


def head_rows(topology: BlockTopology) -> list[list[int]]:
    """The rows of v that make one head's values, for each key-value head, in their order; none where no rotation of them can be absorbed: without
    attention, and where a gate multiplies what it makes of them."""
    site = topology.value_site
    index: tuple[int, ...] = site.makers[0].index if site is not None and len(site.makers) == 1 else ()
    size = max(1, len(index) // topology.heads)
    return [list(rows) for rows in dict.fromkeys(index[start : start + size] for start in range(0, len(index), size))]


def rotate_values(block: nn.Module, topology: BlockTopology, rotations: Sequence[Chain]) -> None:
    """Every head's values are rotated: rows of v (and its bias), and the columns of o for all query heads that share them.

    rotations: orthogonal, of one head's channels, for each of head_rows.
    """
    site = topology.value_site
    if site is None or not rotations:
        return
    value = block.get_submodule(site.makers[0].module)
    weight_OI, bias_O = reader_weight(value), reader_bias(value)
    turns = [_through(rotation, weight_OI.device) for rotation in rotations]
    for turn, rows in zip(turns, head_rows(topology), strict=True):
        weight_OI[rows] = turn(weight_OI[rows].T.double()).T.to(weight_OI.dtype)
        if bias_O is not None:
            bias_O[rows] = turn(bias_O[None, rows].double())[0].to(bias_O.dtype)

    def columns(w_NC: Tensor) -> Tensor:
        shared = w_NC.reshape(len(w_NC), len(turns), topology.heads // len(turns), -1).unbind(1)
        return torch.stack([turn(some_NAE) for turn, some_NAE in zip(turns, shared, strict=True)], 1).reshape(w_NC.shape)

    for path in site.readers:
        rowwise(reader_weight(block.get_submodule(path)), columns)


def permute(block: nn.Module, site: Site, index_C: Tensor) -> None:
    """The site's channel c becomes what channel index_C[c] was."""
    for rows in site.makers:
        maker, to_C = block.get_submodule(rows.module), torch.tensor(rows.index, device=index_C.device)
        _take(reader_weight(maker), to_C, index_C)
        bias_O = reader_bias(maker)
        if bias_O is not None:
            _take(bias_O, to_C, index_C)
    for path in site.readers:
        weight_OC = reader_weight(block.get_submodule(path))
        weight_OC.copy_(weight_OC[:, index_C])


def _take(values: Tensor, to_C: Tensor, index_C: Tensor) -> None:
    values[to_C] = values[to_C[index_C]]
