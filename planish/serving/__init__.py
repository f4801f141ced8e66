"""planish inside servers: each module is for one server, and is imported by that server only."""

VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose linears vLLM keeps in the rows' order of the checkpoint; others' it may turn about while loading, unseen by planish."""
