"""Of the table of model families (families.py) the vision transformers."""

from dataclasses import replace

from .family import Family, Variant

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

VISION: dict[str, Family] = {
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_REGISTERS,
}
