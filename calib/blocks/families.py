"""The table of model families: which modules of a block read which activation, and what stands before them. Data, read by topology.py.

Adding a family: one `Family` in FAMILIES under its config's model_type (usually a `replace` of a near relative), one line in tests/tiny_models.py;
topology.prove then shows on real weights whether the table is right. Of a mixture of experts the blocks must all have experts, and these the standard
form (experts.py); one line in serving/__init__.py lets vLLM run it.

Written from the model definitions of transformers 5.23 (transformers/models/*/modeling_*.py).
"""

from dataclasses import replace

from .family import Family, Variant, interleaved_k, interleaved_q, interleaved_v, stacked_k, stacked_up, stacked_v

NORMED = "norms of queries and keys"
NEIGHBOURS = "a RoPE that turns neighbouring channels"
SOME_TURN = "a RoPE in some layers only"
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
    "olmo3": replace(OLMO2, architecture="Olmo3ForCausalLM"),
    "exaone4": EXAONE4,
    "granite": replace(LLAMA, architecture="GraniteForCausalLM"),
    "smollm3": replace(LLAMA, architecture="SmolLM3ForCausalLM", obstacle=SOME_TURN),
    "ministral": replace(LLAMA, architecture="MinistralForCausalLM"),
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
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_REGISTERS,
}


def is_mixture(kind: str) -> bool:
    """Whether models of this type (config.model_type) have experts, as far as planish knows them."""
    return kind in FAMILIES and FAMILIES[kind].experts is not None


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
