"""The table of model families: which modules of a block read which activation, and what stands before them. Data, read by topology.py.

Mixtures of experts, models that take images besides text and vision transformers have files of their own (mixtures.py, multimodal.py, vision.py).
Adding a family: one `Family` in FAMILIES under its config's model_type (usually a `replace` of a near relative), one line in tests/tiny_models.py;
topology.prove then shows on real weights whether the table is right. Blocks of several kinds are told apart by `others`. Experts must have the
standard form (experts.py); one line in serving/__init__.py lets vLLM run a family.

Written from the model definitions of transformers 5.23 (transformers/models/*/modeling_*.py).
"""

from dataclasses import replace

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .family import (
    LLAMA,
    NORMED,
    Family,
    OtherBlocks,
    Variant,
    gated_o,
    gated_q,
    interleaved_k,
    interleaved_q,
    interleaved_v,
    stacked_k,
    stacked_up,
    stacked_v,
)
from .mixtures import MIXTURES, QWEN2_MOE
from .multimodal import MULTIMODAL, around
from .vision import VISION

NEIGHBOURS = "a RoPE that turns neighbouring channels"
SOME_TURN = "a RoPE in some layers only"
SCALED = "a factor of queries by their position"

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

OLMO2 = replace(
    LLAMA,
    architecture="Olmo2ForCausalLM",
    qkv_norm=None,
    up_norm=None,
    writers=("post_attention_layernorm", "post_feedforward_layernorm"),
    stream_readers=(*LLAMA.qkv, *LLAMA.up),
    obstacle=NORMED,
)

EXAONE4 = replace(OLMO2, architecture="Exaone4ForCausalLM")

GLM = replace(
    LLAMA,
    architecture="GlmForCausalLM",
    up=("mlp.gate_up_proj",),
    up_host="mlp.gate_up_proj",
    up_rows=stacked_up,
    obstacle=NEIGHBOURS,
)

GLM4 = replace(GLM, architecture="Glm4ForCausalLM", writers=("post_self_attn_layernorm", "post_mlp_layernorm"))

ARCEE = replace(LLAMA, architecture="ArceeForCausalLM", gated=False, up=("mlp.up_proj",))

APERTUS = replace(
    ARCEE,
    architecture="ApertusForCausalLM",
    qkv_norm="attention_layernorm",
    up_norm="feedforward_layernorm",
    stream_readers=("attention_layernorm", "feedforward_layernorm"),
    obstacle=NORMED,
)


def lfm2_width(config: PreTrainedConfig) -> int:
    """Of its MLPs, whose config may say a larger one."""
    width: int = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = -(-int(config.block_ffn_dim_multiplier * width) // config.block_multiple_of) * config.block_multiple_of
    return width


LFM2 = replace(
    LLAMA,
    architecture="Lfm2ForCausalLM",
    norm="model.embedding_norm",
    qkv_norm="operator_norm",
    o="self_attn.out_proj",
    obstacle=NORMED,
    up=("feed_forward.w1", "feed_forward.w3"),
    up_norm="ffn_norm",
    down="feed_forward.w2",
    up_host="feed_forward.w3",
    writers=("self_attn.out_proj", "feed_forward.w2"),
    stream_readers=("operator_norm", "ffn_norm"),
    width=lfm2_width,
    others=(
        OtherBlocks(
            when=lambda config, index: config.layer_types[index] == "conv",
            changes={
                "mixing": ("in", "out"),
                "qkv": ("conv.in_proj",),
                "q": None,
                "k": None,
                "v": None,
                "o": "conv.out_proj",
                "writers": ("conv.out_proj", "feed_forward.w2"),
            },
        ),
    ),
)

QWEN3_5 = replace(
    LLAMA,
    architecture="Qwen3_5ForCausalLM",
    q_rows=gated_q,
    o_gate=gated_o,
    obstacle=NORMED,
    norm_offset=1.0,
    others=(
        OtherBlocks(
            when=lambda config, index: config.layer_types[index] == "linear_attention",
            changes={
                "mixing": ("in", "out"),
                "qkv": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
                "beside": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
                "q": None,
                "k": None,
                "v": None,
                "o": "linear_attn.out_proj",
                "writers": ("linear_attn.out_proj", "mlp.down_proj"),
            },
        ),
    ),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    architecture="Qwen3_5MoeForCausalLM",
    writers=("self_attn.o_proj",),
    others=tuple(replace(other, changes={**other.changes, "writers": ("linear_attn.out_proj",)}) for other in QWEN3_5.others),
    **{name: getattr(QWEN2_MOE, name) for name in ("up", "down", "up_host", "experts", "shared", "routers", "width")},
)

STARCODER2 = replace(
    LLAMA,
    architecture="Starcoder2ForCausalLM",
    gated=False,
    up=("mlp.c_fc",),
    up_host="mlp.c_fc",
    down="mlp.c_proj",
    writers=("self_attn.o_proj", "mlp.c_proj"),
    norm_kind="layer",
)

STABLELM = replace(
    LLAMA,
    architecture="StableLmForCausalLM",
    norm_kind="layer",
    variants=(Variant(when=lambda config: config.qk_layernorm, changes={"obstacle": NORMED}),),
    refuse=((lambda config: config.use_parallel_residual, "its attention and its MLP read one norm (use_parallel_residual)"),),
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

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, architecture="MistralForCausalLM"),
    "qwen2": replace(LLAMA, architecture="Qwen2ForCausalLM"),
    "qwen3": replace(LLAMA, architecture="Qwen3ForCausalLM", obstacle=NORMED),
    "lfm2": LFM2,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, architecture="Gemma3ForCausalLM", obstacle=NORMED),
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, architecture="Olmo3ForCausalLM"),
    "exaone4": EXAONE4,
    "granite": replace(LLAMA, architecture="GraniteForCausalLM"),
    "smollm3": replace(LLAMA, architecture="SmolLM3ForCausalLM", obstacle=SOME_TURN),
    "ministral": replace(LLAMA, architecture="MinistralForCausalLM"),
    "ministral3": replace(LLAMA, architecture="Ministral3ForCausalLM", obstacle=SCALED),
    "seed_oss": replace(LLAMA, architecture="SeedOssForCausalLM"),
    "hunyuan_v1_dense": replace(LLAMA, architecture="HunYuanDenseV1ForCausalLM", obstacle=NORMED),
    "ernie4_5": replace(LLAMA, architecture="Ernie4_5ForCausalLM", obstacle=NEIGHBOURS),
    "helium": replace(LLAMA, architecture="HeliumForCausalLM", obstacle=NEIGHBOURS),
    "glm": GLM,
    "glm4": GLM4,
    "arcee": ARCEE,
    "apertus": APERTUS,
    "nemotron": replace(ARCEE, architecture="NemotronForCausalLM", norm_kind="layer", norm_offset=1.0),
    "starcoder2": STARCODER2,
    "stablelm": STABLELM,
    "gpt2": GPT2,
    "opt": OPT,
    "gpt_neox": GPT_NEOX,
    **MIXTURES,
    **VISION,
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The table of a model of this config, with its paths; None where there is none."""
    kind = MULTIMODAL.get(config.model_type)
    if kind is None:
        return FAMILIES.get(config.model_type)
    text = kind.text or FAMILIES.get(config.get_text_config().model_type)
    return around(text, kind, config) if text is not None and text.input == "input_ids" and text.blocks.startswith("model.") else None


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether models of this config are mixtures of experts, as far as planish knows them."""
    family = family_of(config)
    return family is not None and family.experts is not None


def around_unknown(config: PreTrainedConfig) -> str:
    """What to say of a model that takes images and that planish has no table of; empty for any other."""
    if family_of(config) is not None or not config.sub_configs or not hasattr(config, "text_config"):
        return ""
    text = config.text_config.model_type
    if text not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # CLIP's, say
        return ""
    return f"this is a multimodal model around a {text} language model. Save that one as a checkpoint of its own and give planish that."


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
