"""planish inside servers: each module is for one server, and is imported by that server only."""

from typing import Any

METHOD = "planish"
"""What vLLM calls the quantization of planish's checkpoints."""

VLLM_FAMILIES = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text", "phi3", "granite", "smollm3"),
    *("glm", "glm4", "exaone4", "nemotron", "olmo2", "olmo3", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "helium", "arcee", "apertus"),
    *("starcoder2", "stablelm", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "olmoe", "glm4_moe"),
    *("gemma3", "mistral3", "llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "smolvlm"),
)
"""Those that were seen to compute in vLLM what planish.load does: there linears have the checkpoint's rows' order. Others' rows vLLM may turn about
while loading, unseen by planish."""


def is_ours(config: Any) -> bool:
    """Whether vLLM's quant_config is of a checkpoint of planish."""
    return config is not None and config.get_name() == METHOD
