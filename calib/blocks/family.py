"""What a family's table says (Family), and in which rows of its layers queries, keys, values and MLPs' inner channels are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

EXPERTS = "mlp.experts"  # where a mixture's are, each by its number, from the block


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a block's inner activations: the attention's output has heads * head_dim channels, the MLP's inner one has width.

    nope: where keys are made of a latent, how many channels of a head's are without RoPE.
    """

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    nope: int = 0


RowMap = Callable[[Sizes], tuple[int, ...]]


def _value_rows(sizes: Sizes, start: int, stride: int) -> tuple[int, ...]:
    """Row that makes channel c of o's input, where kv head h has its v rows from start + h * stride; heads / kv_heads query heads share a kv head."""
    group = sizes.heads // sizes.kv_heads
    return tuple(start + head // group * stride + i for head in range(sizes.heads) for i in range(sizes.head_dim))


def separate_v(sizes: Sizes) -> tuple[int, ...]:
    """A v_proj of its own: rows [kv head, head_dim]."""
    return _value_rows(sizes, 0, sizes.head_dim)


def stacked_v(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [all q; all k; all v]."""
    return _value_rows(sizes, (sizes.heads + sizes.kv_heads) * sizes.head_dim, sizes.head_dim)


def interleaved_v(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [head, (q, k, v), head_dim]."""
    return _value_rows(sizes, 2 * sizes.head_dim, 3 * sizes.head_dim)


def latent_v(sizes: Sizes) -> tuple[int, ...]:
    """One projection of the latent with rows [head, (keys without RoPE, v), ...]."""
    stride = sizes.nope + sizes.head_dim
    return tuple(stride * head + sizes.nope + i for head in range(sizes.heads) for i in range(sizes.head_dim))


def latent_k(sizes: Sizes) -> tuple[int, ...]:
    """Of that projection the keys without RoPE."""
    return tuple((sizes.nope + sizes.head_dim) * head + i for head in range(sizes.heads) for i in range(sizes.nope))


def separate_q(sizes: Sizes) -> tuple[int, ...]:
    """A q_proj of its own, or the first rows of one projection: rows [head, head_dim]."""
    return tuple(range(sizes.heads * sizes.head_dim))


def gated_q(sizes: Sizes) -> tuple[int, ...]:
    """A q_proj that makes a gate of the output besides: rows [head, (q, gate), head_dim]."""
    return tuple(2 * sizes.head_dim * head + i for head in range(sizes.heads) for i in range(sizes.head_dim))


def gated_o(sizes: Sizes) -> tuple[int, ...]:
    """The gate that such a q_proj makes, which multiplies o's input."""
    return tuple(sizes.head_dim + row for row in gated_q(sizes))


def separate_k(sizes: Sizes) -> tuple[int, ...]:
    """A k_proj of its own: rows [kv head, head_dim]."""
    return tuple(range(sizes.kv_heads * sizes.head_dim))


def stacked_k(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [all q; all k; all v]."""
    return tuple(sizes.heads * sizes.head_dim + row for row in separate_k(sizes))


def interleaved_q(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [head, (q, k, v), head_dim]."""
    return tuple(3 * sizes.head_dim * head + i for head in range(sizes.heads) for i in range(sizes.head_dim))


def interleaved_k(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [head, (q, k, v), head_dim]."""
    return tuple(sizes.head_dim + row for row in interleaved_q(sizes))


def separate_up(sizes: Sizes) -> tuple[int, ...]:
    """An up projection of its own."""
    return tuple(range(sizes.width))


def stacked_up(sizes: Sizes) -> tuple[int, ...]:
    """One projection with rows [all gate; all up]."""
    return tuple(range(sizes.width, 2 * sizes.width))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Fields of the family that are different when the config says so."""

    when: Callable[[PreTrainedConfig], bool]
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherBlocks:
    """Fields of the family that are different in the blocks, by their numbers, of which the config says so: none of those that are the model's."""

    when: Callable[[PreTrainedConfig, int], bool]
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family. Paths in the first group are from the model, all others from the block. Defaults are Llama's.

    architecture: the class that is opened. wrappers: classes around the same blocks, whose checkpoints are opened as `architecture` too (an image
    classifier as its encoder). options: what the class is made with besides its config. in_files: parts of names, and what they are in files.
    body, images: as in sites.Topology, filled in by multimodal.py. embeddings, norm, head, input, call, lead, norm_kind, norm_offset: as in
    sites.Topology; last_reader too, None: the head. writers, stream_readers: as in sites.BlockTopology. mixing: the names of the sites before and
    behind what mixes the tokens. inner: name, readers and norm of the sites between these two. qkv, up: readers of those sites (up with the gate,
    if gated). beside: layers that read what qkv do and stay in full precision. qkv_norm, up_norm: the norm that makes their input, None if no
    norm stands between the residual stream and them, or one without weights. q, q_rows, k, k_rows, rotary, obstacle: as in sites.Attention; q and
    k None where there is none. latent: whether keys and values are made of a latent, which a cache holds instead of them (multi-head latent
    attention). v, v_rows: the module and its rows that make o's input, None if something lies between. o_gate: rows of q that multiply o's input,
    channel by channel. up_host, up_rows: those that make down's input, if the MLP is gated or its activation homogeneous.
    experts: how many there are, in a mixture; up, down and up_host are then from each of them (mlp.experts.NUMBER). shared: a module with the same
    layers that sees every token, before the experts do or, with shared_last, after them; and its inner size. routers: what reads their input besides.
    writers: without the experts' own. width: the inner size of the MLP, or of an expert. activation: the config's name for its function.
    others: the blocks of which something else holds.
    refuse: conditions under which the table does not hold, each with the reason.
    """

    architecture: str
    wrappers: tuple[str, ...] = ()
    options: Mapping[str, bool] = field(default_factory=dict)
    in_files: tuple[tuple[str, str], ...] = ()
    body: str = ""
    images: tuple[str, ...] = ()
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    norm: str | None = "model.norm"
    head: str | None = "lm_head"
    last_reader: str | None = None
    input: Literal["input_ids", "pixel_values"] = "input_ids"
    call: tuple[tuple[str, bool], ...] = (("use_cache", False),)
    lead: Callable[[PreTrainedConfig], int] = lambda config: 0

    mixing: tuple[str, str] = ("qkv", "o")
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    inner: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    beside: tuple[str, ...] = ()
    qkv_norm: str | None = "input_layernorm"
    q: str | None = "self_attn.q_proj"
    q_rows: RowMap = separate_q
    k: str | None = "self_attn.k_proj"
    k_rows: RowMap = separate_k
    rotary: bool = True
    obstacle: str = ""
    o: str = "self_attn.o_proj"
    v: str | None = "self_attn.v_proj"
    v_rows: RowMap = separate_v
    o_gate: RowMap | None = None
    gated: bool = True
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up_norm: str | None = "post_attention_layernorm"
    down: str = "mlp.down_proj"
    up_host: str = "mlp.up_proj"
    up_rows: RowMap = separate_up
    experts: Callable[[PreTrainedConfig], int] | None = None
    shared: tuple[str, Callable[[PreTrainedConfig], int]] | None = None
    shared_last: bool = False
    routers: tuple[str, ...] = ()

    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    stream_readers: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    width: Callable[[PreTrainedConfig], int] = lambda config: config.intermediate_size
    latent: bool = False
    activation: str = "hidden_act"
    variants: tuple[Variant, ...] = ()
    others: tuple[OtherBlocks, ...] = ()
    refuse: tuple[tuple[Callable[[PreTrainedConfig], bool], str], ...] = ()


NORMED = "norms of queries and keys"
LLAMA = Family(architecture="LlamaForCausalLM")
