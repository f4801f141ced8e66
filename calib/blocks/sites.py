"""The nouns of a topology (Host, Site, BlockTopology, Topology) and what one does at a site: see its readers' weights, tie a scale, absorb it.

Shape suffixes: C channels of a site, O and I out and in channels of one layer, R rows of a host's output.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import routes_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What can divide a site's channels at no cost.

    norm: `module` multiplies channel c by offset + weight[c] (and adds bias[c]). rows: row index[c] of `module`'s output enters channel c linearly;
    channels that share a row (grouped-query attention) must share their scale, see `tie`.
    """

    kind: Literal["norm", "rows"]
    module: str
    offset: float = 0.0
    index: tuple[int, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of a linear layer's output: row index[c] for channel c of a site."""

    module: str
    index: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """An activation (tokens, C) that one or more linear layers read. Paths are from the block. host None: nothing takes a scale for free.

    stream: whether it is the residual stream, normed or not. makers: the rows that make channel c, all alike for every c: in another order they make
    the channels in that order. Empty where a norm makes them. routers: what sends tokens to experts by it, beside: small layers that read it too;
    neither is ever quantized. apart: whether layers of other sites run between its readers.
    """

    name: str
    readers: tuple[str, ...]
    host: Host | None = None
    stream: bool = False
    makers: tuple[Rows, ...] = ()
    routers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    apart: bool = False

    @property
    def all_readers(self) -> tuple[str, ...]:
        """What has to follow where the activation is another by a factor or a basis."""
        return (*self.readers, *self.routers, *self.beside)


def kind_of(site: str) -> str:
    """Of a site's name, what it is: `down` of `down.3`, which is an expert's."""
    return site.partition(".")[0]


def by_kind(sites: Iterable[str]) -> dict[str, list[str]]:
    """These names, each under its kind."""
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(kind_of(site), []).append(site)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Which rows make queries and keys, head by head, `size` channels each, all of one site's readers.

    rotary: whether RoPE turns them before their scores. module: the path of what has the scores' factor as its `scaling`. obstacle: what else stands
    between these rows and the softmax, in words; empty if nothing does. cached: whether a cache holds keys and values as they are.
    """

    q: Rows
    k: Rows
    size: int
    module: str
    rotary: bool = True
    obstacle: str = ""
    cached: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTopology:
    """One block's sites, in the order in which it runs them, and who writes and reads its residual stream; all paths are from the block.

    A block adds its writers' outputs, times a constant in some families, to the stream, and its stream_readers see the stream. Both tuples are empty
    where the stream itself is normalised (OPT with do_layer_norm_before false). A norm on the stream multiplies by norm_offset + weight.
    heads: of queries; they share the channels of o's input evenly. attention: how scores come about, None where something else mixes the tokens.
    """

    family: str
    sites: tuple[Site, ...]
    writers: tuple[str, ...]
    stream_readers: tuple[str, ...]
    norm_offset: float
    heads: int
    attention: Attention | None = None

    @property
    def routers(self) -> tuple[str, ...]:
        """What sends tokens to experts, and is never quantized; none in a block without."""
        return tuple(path for site in self.sites for path in site.routers)

    @property
    def inside(self) -> tuple[Site, ...]:
        """The sites inside the block's MLPs, one of every expert."""
        return tuple(site for site in self.sites if kind_of(site.name) == "down")

    @property
    def names(self) -> tuple[str, ...]:
        """Of its sites."""
        return tuple(site.name for site in self.sites)

    def site(self, name: str) -> Site:
        """The one of this name, which it has."""
        return next(site for site in self.sites if site.name == name)

    @property
    def value_site(self) -> Site | None:
        """The site that reads what attention makes of the values; None without attention."""
        return next((site for site in self.sites if site.name == "o"), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One model's blocks, and what stands before and behind them.

    blocks, embeddings, norm and head are paths from the model. The embeddings' outputs, summed (and in some families scaled), are the first block's
    input. kinds: what blocks there are; kind_at: of every block, which of them it is. norm: the last norm, None if there is none; it multiplies by
    norm_offset + weight. head: what makes logits, None for a vision encoder. last_reader: the linear layer that reads the last norm's output.
    body, images: of a model that takes images too, where its language model is, and the linears whose outputs enter that one's stream for them.
    The model is run as model(**{input: batch}, **dict(call)). lead: how many tokens stand before those of the input (a vision model's class and
    register tokens, before its patches).
    """

    family: str
    blocks: str
    kinds: tuple[BlockTopology, ...]
    kind_at: tuple[int, ...]
    embeddings: tuple[str, ...]
    norm: str | None
    head: str | None
    norm_kind: Literal["rms", "layer"]
    norm_offset: float
    heads: int
    last_reader: str | None = None
    input: Literal["input_ids", "pixel_values"] = "input_ids"
    call: tuple[tuple[str, bool], ...] = (("use_cache", False),)
    lead: int = 0
    body: str = ""
    images: tuple[str, ...] = ()

    @property
    def block_count(self) -> int:
        """How many there are."""
        return len(self.kind_at)

    @property
    def samples(self) -> list[int]:
        """The blocks to look at where not all can be: the first, the last, and the first of every kind."""
        return sorted({0, self.block_count - 1, *map(self.kind_at.index, self.kind_at)})

    def block(self, index: int) -> BlockTopology:
        """Of block `index`."""
        return self.kinds[self.kind_at[index]]

    @property
    def attention(self) -> Attention | None:
        """Of the blocks that have it, which are alike in it; None if none has."""
        return next((kind.attention for kind in self.kinds if kind.attention is not None), None)

    @property
    def without_attention(self) -> bool:
        """Whether something else mixes the tokens in some block."""
        return any(kind.attention is None for kind in self.kinds)

    @property
    def has_cache(self) -> bool:
        """Whether a cache of keys and values of every block is all that later tokens see of earlier ones."""
        return self.head is not None and all(kind.attention is not None and kind.attention.cached for kind in self.kinds)

    @property
    def takes_prefix(self) -> bool:
        """Whether keys and values of a few tokens may stand before every text: has_cache, and nothing counts positions but the text."""
        return self.has_cache and not self.body

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of all sites that some block has."""
        return tuple(dict.fromkeys(name for kind in self.kinds for name in kind.names))

    @property
    def addresses(self) -> tuple[tuple[int, str], ...]:
        """Block and name of every site."""
        return tuple((index, name) for index in range(self.block_count) for name in self.block(index).names)

    def block_name(self, index: int) -> str:
        """The full name of block `index`, as in the checkpoint's tensor names."""
        return f"{self.blocks}.{index}"

    def address(self, linear: str) -> tuple[int, Site] | None:
        """The block and the site that the linear layer of this full name reads; None if it is no site's reader."""
        index, _, path = linear.removeprefix(self.blocks + ".").partition(".")
        if not linear.startswith(self.blocks + ".") or not index.isdecimal() or int(index) >= self.block_count:
            return None
        site = next((site for site in self.block(int(index)).sites if path in site.readers), None)
        return None if site is None else (int(index), site)

    @property
    def routers(self) -> tuple[str, ...]:
        """What sends tokens to experts, and is never quantized; none in a model without."""
        return tuple(dict.fromkeys(path for kind in self.kinds for path in kind.routers))

    @property
    def vision(self) -> bool:
        """Whether the model sees images instead of text."""
        return self.input == "pixel_values"


def reads(module: nn.Module) -> bool:
    """Whether it is a linear layer or a router."""
    return isinstance(module, nn.Linear | Conv1D) or routes_tokens(module)


def reader_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (O, I): a view, transposed for transformers' Conv1D, so that writing to it writes to the layer."""
    if not reads(module):
        raise TypeError(f"{type(module).__name__} is no linear layer")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def reader_bias(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer: (O,), or None."""
    if not reads(module):
        raise TypeError(f"{type(module).__name__} is no linear layer")
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def tie(site: Site, values_C: Tensor) -> Tensor:
    """values_C with one value for all channels that share a host row: the largest of theirs. Unchanged where none share."""
    if site.host is None or site.host.index is None:
        return values_C
    index_C = torch.tensor(site.host.index, device=values_C.device)
    largest_R = values_C.new_full((int(index_C.max()) + 1,), float("-inf")).scatter_reduce_(0, index_C, values_C, "amax")
    return largest_R[index_C]


@torch.no_grad()
def absorb(block: nn.Module, site: Site, scale_C: Tensor) -> None:
    """Turn the site's x into x / scale_C, in place, with the block's output unchanged: the host is divided, the readers' columns are multiplied.

    scale_C: (C,) positive, tied over shared rows; anything else is a ValueError. Computed in float32 or wider, then cast back to the weights' dtype.
    """
    if site.host is None:
        raise ValueError(f"site {site.name} has no host that could absorb a scale")
    readers = [reader_weight(block.get_submodule(path)) for path in site.all_readers]
    if scale_C.shape != readers[0].shape[1:] or not bool((scale_C.isfinite() & (scale_C > 0)).all()):
        raise ValueError(f"site {site.name}: a scale is {readers[0].shape[1]} positive finite numbers, got shape {tuple(scale_C.shape)}")
    host = block.get_submodule(site.host.module)
    if site.host.index is None:
        _divide(_parameter(host, "weight"), scale_C, site.host.offset)
        _divide(_parameter(host, "bias"), scale_C)
    else:
        weight_RI = reader_weight(host)
        scale_R = _row_scale(site, site.host.index, scale_C, weight_RI.shape[0])
        _divide(weight_RI, scale_R[:, None])
        _divide(_parameter(host, "bias"), scale_R)
    for weight_OC in readers:
        weight_OC.copy_(weight_OC * _wide(scale_C, weight_OC))


@torch.no_grad()
def exact_scale(block: nn.Module, site: Site, scale_C: Tensor, stored: torch.dtype) -> Tensor:
    """The scale near scale_C that a norm host takes without rounding when its weight is stored in dtype `stored`; call before absorb.

    (offset + weight) / (offset + new weight), with the new weight rounded to `stored`; (C,), scale_C's dtype. A channel whose new factor is 0
    or changes sign keeps its scale, and so does a site whose host is rows (they are rounded by the solver anyway).
    """
    if site.host is None or site.host.index is not None:
        return scale_C
    weight_C = _parameter(block.get_submodule(site.host.module), "weight")
    assert weight_C is not None
    wide_C = _wide(scale_C, weight_C)
    full_C = weight_C.to(wide_C.dtype) + site.host.offset
    rounded_C = (full_C / wide_C - site.host.offset).to(stored).to(wide_C.dtype) + site.host.offset
    exact_C = full_C / rounded_C
    return torch.where(exact_C.isfinite() & (exact_C > 0), exact_C, wide_C).to(scale_C)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    return dict(module.named_parameters(recurse=False)).get(name)


def _row_scale(site: Site, index: tuple[int, ...], scale_C: Tensor, rows: int) -> Tensor:
    index_C = torch.tensor(index, device=scale_C.device)
    scale_R = scale_C.new_ones(rows)
    scale_R[index_C] = scale_C
    if not torch.equal(scale_R[index_C], scale_C):
        raise ValueError(f"site {site.name}: channels that share a host row have different scales; pass the scale through tie first")
    return scale_R


def _wide(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def _divide(parameter: Tensor | None, scale: Tensor, offset: float = 0.0) -> None:
    """offset + parameter is divided by scale (broadcast), in place."""
    if parameter is not None:
        wide = _wide(scale, parameter)
        parameter.copy_((parameter.to(wide.dtype) + offset) / wide - offset)
