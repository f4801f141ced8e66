"""Of the table of model families (families.py) the mixtures of experts."""

from dataclasses import replace

from .family import LLAMA, NORMED, Family, OtherBlocks, Variant, latent_k, latent_v

DENSE = {  # what a block of a mixture has that has no experts
    "up": LLAMA.up,
    "down": LLAMA.down,
    "up_host": LLAMA.up_host,
    "experts": None,
    "shared": None,
    "routers": (),
    "writers": LLAMA.writers,
    "width": LLAMA.width,
}

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
    others=(
        OtherBlocks(
            when=lambda config, index: index in config.mlp_only_layers or bool((index + 1) % config.decoder_sparse_step),
            changes=DENSE,
        ),
    ),
)

GLM4_MOE = replace(
    QWEN3_MOE,
    architecture="Glm4MoeForCausalLM",
    obstacle="",
    experts=lambda config: config.n_routed_experts,
    shared=("mlp.shared_experts", lambda config: config.moe_intermediate_size * config.n_shared_experts),
    shared_last=True,
    variants=(Variant(when=lambda config: config.use_qk_norm, changes={"obstacle": NORMED}),),
    others=(OtherBlocks(when=lambda config, index: index < config.first_k_dense_replace, changes=DENSE),),
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
    others=(),
)

DEEPSEEK_V3 = replace(
    GLM4_MOE,
    architecture="DeepseekV3ForCausalLM",
    qkv=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    inner=(
        ("q_b", ("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
        ("kv_b", ("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),
    ),
    q="self_attn.q_b_proj",
    k="self_attn.kv_b_proj",
    k_rows=latent_k,
    v="self_attn.kv_b_proj",
    v_rows=latent_v,
    obstacle="a latent",
    latent=True,
    variants=(
        Variant(
            when=lambda config: config.q_lora_rank is None,
            changes={
                "qkv": ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
                "inner": (("kv_b", ("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),),
                "q": "self_attn.q_proj",
            },
        ),
    ),
)

MIXTURES: dict[str, Family] = {
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "glm4_moe": GLM4_MOE,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe_lite": replace(
        DEEPSEEK_V3,
        architecture="Glm4MoeLiteForCausalLM",
        others=(OtherBlocks(when=lambda config, index: config.mlp_layer_types[index] == "dense", changes=DENSE),),
    ),
    "qwen2_moe": QWEN2_MOE,
    "olmoe": replace(
        QWEN3_MOE,
        architecture="OlmoeForCausalLM",
        width=lambda config: config.intermediate_size,
        others=(),
        refuse=((lambda config: config.clip_qkv is not None, "clip_qkv cuts queries, keys and values off, so nothing goes through them freely"),),
    ),
}
