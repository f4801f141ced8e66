"""The table of model families: which modules of a block read which activation, and what stands before them. Data, read by topology.py.

Adding a family: one `Family` in FAMILIES under its config's model_type (usually a `replace` of a near relative), one line in tests/tiny_models.py;
topology.prove then shows on real weights whether the table is right.

Written from the model definitions of transformers 5.23 (transformers/models/*/modeling_*.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a block's inner activations: the attention's output has heads * head_dim channels, the MLP's inner one has width."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int


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


def separate_q(sizes: Sizes) -> tuple[int, ...]:
    """A q_proj of its own, or the first rows of one projection: rows [head, head_dim]."""
    return tuple(range(sizes.heads * sizes.head_dim))


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
class Family:
    """One family. Paths in the first group are from the model, all others from the block. Defaults are Llama's.

    architecture: the class that is opened. wrappers: classes around the same blocks, whose checkpoints are opened as `architecture` too (an image
    classifier as its encoder). options: what the class is made with besides its config. in_files: parts of names, and what they are in files.
    embeddings, norm, head, input, call, lead, writers, stream_readers, norm_kind, norm_offset: as in sites.Topology; last_reader too, None: the head.
    qkv, up: readers of those sites (up with the gate, if gated). qkv_norm, up_norm: the norm that makes their input, None if no norm stands
    between the residual stream and them, or one without weights. q, q_rows, k, k_rows, rotary, obstacle: as in
    sites.Attention. v, v_rows: the module and its rows that make o's input. up_host, up_rows: those that make down's input, if the MLP is gated or
    its activation homogeneous. experts: how many there are, in a mixture; up, down and up_host are then from each of them (mlp.experts.NUMBER).
    shared: a module with the same layers that sees every token, before the experts do, and its inner size. routers: what reads their input besides.
    writers: without the experts' own. width: the inner size of the MLP, or of an expert. activation: the config's name for its function.
    refuse: conditions under which the table does not hold, each with the reason.
    """

    architecture: str
    wrappers: tuple[str, ...] = ()
    options: Mapping[str, bool] = field(default_factory=dict)
    in_files: tuple[tuple[str, str], ...] = ()
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    norm: str | None = "model.norm"
    head: str | None = "lm_head"
    last_reader: str | None = None
    input: Literal["input_ids", "pixel_values"] = "input_ids"
    call: tuple[tuple[str, bool], ...] = (("use_cache", False),)
    lead: Callable[[PreTrainedConfig], int] = lambda config: 0

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_norm: str | None = "input_layernorm"
    q: str = "self_attn.q_proj"
    q_rows: RowMap = separate_q
    k: str = "self_attn.k_proj"
    k_rows: RowMap = separate_k
    rotary: bool = True
    obstacle: str = ""
    o: str = "self_attn.o_proj"
    v: str = "self_attn.v_proj"
    v_rows: RowMap = separate_v
    gated: bool = True
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up_norm: str | None = "post_attention_layernorm"
    down: str = "mlp.down_proj"
    up_host: str = "mlp.up_proj"
    up_rows: RowMap = separate_up
    experts: Callable[[PreTrainedConfig], int] | None = None
    shared: tuple[str, Callable[[PreTrainedConfig], int]] | None = None
    routers: tuple[str, ...] = ()

    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    stream_readers: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    width: Callable[[PreTrainedConfig], int] = lambda config: config.intermediate_size
    activation: str = "hidden_act"
    variants: tuple[Variant, ...] = ()
    refuse: tuple[tuple[Callable[[PreTrainedConfig], bool], str], ...] = ()


NORMED = "norms of queries and keys"
LLAMA = Family(architecture="LlamaForCausalLM")

GEMMA2 = replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    up_norm="pre_feedforward_layernorm",
    writers=("post_attention_layernorm", "post_feedforward_layernorm"),
    stream_readers=("input_layernorm", "pre_feedforward_layernorm"),
    norm_offset=1.0,
    obstacle="a cap on the scores",
)

PHI3 = replace(
    LLAMA,
    architecture="Phi3ForCausalLM",
    qkv=("self_attn.qkv_proj",),
    q="self_attn.qkv_proj",
    k="self_attn.qkv_proj",
    k_rows=stacked_k,
    v="self_attn.qkv_proj",
    v_rows=stacked_v,
    up=("mlp.gate_up_proj",),
    up_host="mlp.gate_up_proj",
    up_rows=stacked_up,
)

QWEN3_MOE = replace(
    LLAMA,
    architecture="Qwen3MoeForCausalLM",
    obstacle=NORMED,
    up=("gate_proj", "up_proj"),
    down="down_proj",
    up_host="up_proj",
    experts=lambda config: config.num_experts,
    routers=("mlp.gate",),
    writers=("self_attn.o_proj",),
    width=lambda config: config.moe_intermediate_size,
    refuse=((lambda config: bool(config.mlp_only_layers) or config.decoder_sparse_step != 1, "some of its blocks have no experts"),),
)

QWEN2_MOE = replace(
    QWEN3_MOE,
    architecture="Qwen2MoeForCausalLM",
    obstacle="",
    shared=("mlp.shared_expert", lambda config: config.shared_expert_intermediate_size),
    routers=("mlp.gate", "mlp.shared_expert_gate"),
)

MIXTRAL = replace(
    QWEN3_MOE,
    architecture="MixtralForCausalLM",
    in_files=((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2.")),
    obstacle="",
    experts=lambda config: config.num_local_experts,
    width=lambda config: config.intermediate_size,
    refuse=(),
)

OLMO2 = replace(
    LLAMA,
    architecture="Olmo2ForCausalLM",
    qkv_norm=None,
    up_norm=None,
    writers=("post_attention_layernorm", "post_feedforward_layernorm"),
    stream_readers=(*LLAMA.qkv, *LLAMA.up),
    obstacle=NORMED,
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    blocks="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    norm="transformer.ln_f",
    qkv=("attn.c_attn",),
    qkv_norm="ln_1",
    q="attn.c_attn",
    k="attn.c_attn",
    k_rows=stacked_k,
    rotary=False,
    o="attn.c_proj",
    v="attn.c_attn",
    v_rows=stacked_v,
    gated=False,
    up=("mlp.c_fc",),
    up_norm="ln_2",
    down="mlp.c_proj",
    up_host="mlp.c_fc",
    writers=("attn.c_proj", "mlp.c_proj"),
    stream_readers=("ln_1", "ln_2"),
    norm_kind="layer",
    width=lambda config: config.n_inner or 4 * config.hidden_size,
    activation="activation_function",
    refuse=((lambda config: config.add_cross_attention, "add_cross_attention is true, so its blocks also read an encoder's output"),),
)

OPT = Family(
    architecture="OPTForCausalLM",
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    norm="model.decoder.final_layer_norm",
    qkv_norm="self_attn_layer_norm",
    rotary=False,
    o="self_attn.out_proj",
    gated=False,
    up=("fc1",),
    up_norm="final_layer_norm",
    down="fc2",
    up_host="fc1",
    writers=("self_attn.out_proj", "fc2"),
    stream_readers=("self_attn_layer_norm", "final_layer_norm"),
    norm_kind="layer",
    width=lambda config: config.ffn_dim,
    activation="activation_function",
    variants=(
        Variant(
            when=lambda config: config.word_embed_proj_dim != config.hidden_size,
            changes={"embeddings": ("model.decoder.project_in", "model.decoder.embed_positions"), "last_reader": "model.decoder.project_out"},
        ),
        Variant(when=lambda config: not config.layer_norm_elementwise_affine, changes={"qkv_norm": None, "up_norm": None}),
        Variant(when=lambda config: config._remove_final_layer_norm, changes={"norm": None}),
        Variant(
            when=lambda config: not config.do_layer_norm_before,
            changes={"qkv_norm": None, "up_norm": None, "norm": None, "writers": (), "stream_readers": ()},
        ),
    ),
)

GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    norm="gpt_neox.final_layer_norm",
    qkv=("attention.query_key_value",),
    q="attention.query_key_value",
    q_rows=interleaved_q,
    k="attention.query_key_value",
    k_rows=interleaved_k,
    o="attention.dense",
    v="attention.query_key_value",
    v_rows=interleaved_v,
    gated=False,
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    up_host="mlp.dense_h_to_4h",
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    norm_kind="layer",
)

VIT = Family(
    architecture="ViTModel",
    wrappers=("ViTForImageClassification", "ViTForMaskedImageModeling"),
    options={"add_pooling_layer": False},
    blocks="layers",
    embeddings=("embeddings",),
    norm="layernorm",
    head=None,
    input="pixel_values",
    call=(("interpolate_pos_encoding", True),),
    lead=lambda config: 1,
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    qkv_norm="layernorm_before",
    q="attention.q_proj",
    k="attention.k_proj",
    rotary=False,
    obstacle="no order of tokens",
    o="attention.o_proj",
    v="attention.v_proj",
    gated=False,
    up=("mlp.fc1",),
    up_norm="layernorm_after",
    down="mlp.fc2",
    up_host="mlp.fc1",
    writers=("attention.o_proj", "mlp.fc2"),
    stream_readers=("layernorm_before", "layernorm_after"),
    norm_kind="layer",
)

DINOV2 = replace(
    VIT,
    architecture="Dinov2Model",
    wrappers=("Dinov2ForImageClassification", "Dinov2Backbone"),
    options={},
    blocks="encoder.layer",
    call=(),
    qkv_norm="norm1",
    up_norm="norm2",
    writers=("layer_scale1", "layer_scale2"),
    stream_readers=("norm1", "norm2"),
    width=lambda config: int(config.hidden_size * config.mlp_ratio),
    variants=(
        Variant(
            when=lambda config: config.use_swiglu_ffn,
            changes={
                "gated": True,
                "up": ("mlp.gate_proj", "mlp.up_proj"),
                "down": "mlp.down_proj",
                "up_host": "mlp.up_proj",
                "width": lambda config: (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8,
            },
        ),
    ),
)

DINOV2_REGISTERS = replace(
    DINOV2,
    architecture="Dinov2WithRegistersModel",
    wrappers=("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersBackbone"),
    lead=lambda config: 1 + config.num_register_tokens,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, architecture="MistralForCausalLM"),
    "qwen2": replace(LLAMA, architecture="Qwen2ForCausalLM"),
    "qwen3": replace(LLAMA, architecture="Qwen3ForCausalLM", obstacle=NORMED),
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "olmoe": replace(
        QWEN3_MOE,
        architecture="OlmoeForCausalLM",
        width=lambda config: config.intermediate_size,
        refuse=((lambda config: config.clip_qkv is not None, "clip_qkv cuts queries, keys and values off, so nothing goes through them freely"),),
    ),
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, architecture="Gemma3ForCausalLM", obstacle=NORMED),
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "opt": OPT,
    "gpt_neox": GPT_NEOX,
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_REGISTERS,
}


def name_in_files(kind: str, name: str) -> str:
    """What a parameter, or a layer, is called in the files of models of this type (config.model_type)."""
    for part, other in FAMILIES[kind].in_files if kind in FAMILIES else ():
        name = f"{name}.".replace(part, other)[:-1]
    return name


def name_in_model(kind: str, name: str) -> str:
    """The inverse of `name_in_files`."""
    for part, other in FAMILIES[kind].in_files if kind in FAMILIES else ():
        name = f"{name}.".replace(other, part)[:-1]
    return name
