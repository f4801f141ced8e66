"""Tiny random models, one of every family (and of the variants that differ in topology), from transformers' own classes.

CONFIGS are the language models, VISION the vision encoders; what goes over CONFIGS or FAMILIES sees language models alone.

Norm weights and biases are random, not ones and zeros, so that a scale put in the wrong place shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from planish.calib.blocks.experts import Experts, separate

VOCABULARY = 200
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_ROTARY = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
_GEMMA = {**_ROTARY, "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
_MIXTURE = {**_ROTARY, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {
    **_ROTARY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_OPT = {**_COMMON, "ffn_dim": 128}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, "model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": True},
    "llama-biased": {**_ROTARY, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "mistral": {**_ROTARY, "model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 8},
    "qwen2": {**_ROTARY, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_ROTARY, "model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {**_MIXTURE, "model_type": "qwen3_moe", "head_dim": 32},
    "qwen2_moe": {**_MIXTURE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 80, "tie_word_embeddings": True},
    "olmoe": {**_ROTARY, "model_type": "olmoe", "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**_ROTARY, "model_type": "mixtral", "num_local_experts": 4},
    "gemma2": {**_GEMMA, "model_type": "gemma2"},
    "gemma3_text": {**_GEMMA, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {**_ROTARY, "model_type": "phi3"},
    "olmo2": {**_ROTARY, "model_type": "olmo2"},
    "gpt2": {**_COMMON, "model_type": "gpt2", "n_inner": 128, "tie_word_embeddings": True},
    "opt": {**_OPT, "model_type": "opt", "tie_word_embeddings": True},
    "opt-gelu": {**_OPT, "model_type": "opt", "activation_function": "gelu"},
    "opt-plain-norm": {**_OPT, "model_type": "opt", "layer_norm_elementwise_affine": False, "enable_bias": False},
    "opt-350m": {**_OPT, "model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "gpt_neox": {**_COMMON, "model_type": "gpt_neox", "intermediate_size": 128},
    "gpt_neox-serial": {**_COMMON, "model_type": "gpt_neox", "intermediate_size": 128, "use_parallel_residual": False, "hidden_act": "relu"},
}
FAMILIES = tuple(name for name in CONFIGS if "-" not in name)
RELATIVES: dict[str, dict[str, Any]] = {
    "qwen3_moe-some": {**_MIXTURE, "model_type": "qwen3_moe", "head_dim": 32, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "glm4_moe": {
        **_ROTARY,
        "model_type": "glm4_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "attention_bias": True,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {**_LATENT, "model_type": "deepseek_v3", "q_lora_rank": 32, "first_k_dense_replace": 1},
    "deepseek_v3-direct": {**_LATENT, "model_type": "deepseek_v3", "q_lora_rank": None, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_LATENT, "model_type": "glm4_moe_lite", "q_lora_rank": 32},
    "lfm2": {
        **_ROTARY,
        "model_type": "lfm2",
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_5_text": {
        **_ROTARY,
        **_DELTA,
        "model_type": "qwen3_5_text",
    },
    "qwen3_5_moe_text": {
        **_MIXTURE,
        **_DELTA,
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 80,
    },
    "olmo3": {**_ROTARY, "model_type": "olmo3", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {**_ROTARY, "model_type": "exaone4", "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {
        **_ROTARY,
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {**_ROTARY, "model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "ministral": {**_ROTARY, "model_type": "ministral", "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {
        **_ROTARY,
        "model_type": "ministral3",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.1,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "seed_oss": {**_ROTARY, "model_type": "seed_oss", "head_dim": 32, "attention_bias": True},
    "hunyuan_v1_dense": {**_ROTARY, "model_type": "hunyuan_v1_dense", "head_dim": 32},
    "ernie4_5": {**_ROTARY, "model_type": "ernie4_5", "head_dim": 16, "tie_word_embeddings": True},
    "helium": {**_ROTARY, "model_type": "helium", "head_dim": 16},
    "glm": {**_ROTARY, "model_type": "glm", "head_dim": 16, "attention_bias": True},
    "glm4": {**_ROTARY, "model_type": "glm4", "head_dim": 16},
    "arcee": {**_ROTARY, "model_type": "arcee"},
    "apertus": {**_ROTARY, "model_type": "apertus"},
    "nemotron": {**_ROTARY, "model_type": "nemotron", "head_dim": 16},
    "starcoder2": {**_ROTARY, "model_type": "starcoder2", "sliding_window": 8, "tie_word_embeddings": True},
    "stablelm": {**_ROTARY, "model_type": "stablelm", "use_qkv_bias": True, "qk_layernorm": True},
}
"""Families whose tables are another's but for names, or differ in one thing of which CONFIGS has a case: what goes over them all would take long."""
OFFSET = ("Gemma", "NemotronLayerNorm1P", "Qwen3_5RMSNorm")  # norms that store what they multiply by, minus 1
MIXTURES = (
    *("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "qwen3_moe-some", "qwen3_5_moe_text", "glm4_moe"),
    *("deepseek_v3", "deepseek_v3-direct", "glm4_moe_lite"),
)

_IMAGE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "num_labels": 5}
VISION: dict[str, dict[str, Any]] = {
    "vit": {**_IMAGE, "model_type": "vit", "intermediate_size": 96},
    "vit-relu": {**_IMAGE, "model_type": "vit", "intermediate_size": 96, "hidden_act": "relu", "qkv_bias": False},
    "dinov2": {**_IMAGE, "model_type": "dinov2", "mlp_ratio": 2},
    "dinov2-swiglu": {**_IMAGE, "model_type": "dinov2", "mlp_ratio": 2, "use_swiglu_ffn": True},
    "dinov2_with_registers": {**_IMAGE, "model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 3},
}
VISION_FAMILIES = tuple(name for name in VISION if "-" not in name)


def tiny(family: str, seed: int = 0, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A float32 model in eval mode. family: a key of CONFIGS or RELATIVES. changes: other values for its config."""
    values = {**(CONFIGS | RELATIVES)[family], **(changes or {})}
    return random_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)), seed)


def tiny_vision(family: str, seed: int = 0, classifier: bool = False) -> PreTrainedModel:
    """A float32 encoder in eval mode, or an image classifier around one. family: a key of VISION."""
    auto = AutoModelForImageClassification if classifier else AutoModel
    return random_weights(auto.from_config(AutoConfig.for_model(**VISION[family])), seed)


def whole(model: PreTrainedModel) -> PreTrainedModel:
    """The same with one tensor of all experts, as transformers has it, and saves it by the names that such models have."""
    state = dict(model.state_dict())
    for path, experts in model.named_modules():
        if isinstance(experts, Experts):
            state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
            state[f"{path}.gate_up_proj"] = torch.stack([torch.cat([one.gate_proj.weight, one.up_proj.weight]) for one in experts])
            state[f"{path}.down_proj"] = torch.stack([one.down_proj.weight for one in experts])
    if len(state) == len(model.state_dict()):
        return model
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(state)
    return other.eval()


def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _randomise(module, generator)
    model.tie_weights()
    separate(model)
    return model.eval()


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices keep a signal's size; norms multiply by 0.5 to 1.5 (some store that minus 1); biases and LayerNorm shifts are about 0.3."""
    for name, parameter in module.named_parameters(recurse=False):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            size = 0.2 if isinstance(module, nn.Embedding) else min(parameter.shape[-2:]) ** -0.5
            parameter.copy_(size * noise)
        elif name == "weight":
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + (-0.5 if type(module).__name__.startswith(OFFSET) else 0.5))
        else:
            parameter.copy_(0.3 * noise)
    if isinstance(bias := getattr(module, "e_score_correction_bias", None), Tensor):  # of a router, a buffer in files
        bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))


def tokens(samples: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """(samples, length) random token ids, without the special ones."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def pixels(samples: int = 2, height: int = 16, width: int = 16, seed: int = 1) -> Tensor:
    """(samples, 3, height, width) random images."""
    return torch.randn(samples, 3, height, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class BlockCall:
    """A block of a model with the arguments that it was called with."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """The output of `block` on these arguments."""
        with torch.no_grad():
            output = block(*self.args, **self.kwargs)
        assert isinstance(output, Tensor)
        return output


def block_calls(model: PreTrainedModel, blocks: str, batch: Tensor) -> list[BlockCall]:
    """How a forward pass on token ids or images calls every module of the list at path `blocks`"""
    calls: list[BlockCall] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: calls.append(BlockCall(module, args, kwargs)), with_kwargs=True)
        for block in model.get_submodule(blocks).children()
    ]
    try:
        with torch.no_grad():
            model(batch, **({} if batch.is_floating_point() else {"use_cache": False}))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
