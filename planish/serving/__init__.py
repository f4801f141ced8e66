"""planish inside servers: each module is for one server, and is imported by that server only."""

from typing import Any

METHOD = "planish"
"""What vLLM calls the quantization of planish's checkpoints."""

VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Whose linears vLLM keeps in the rows' order of the checkpoint; others' it may turn about while loading, unseen by planish."""


def is_ours(config: Any) -> bool:
    """Whether vLLM's quant_config is of a checkpoint of planish."""
    return config is not None and config.get_name() == METHOD
