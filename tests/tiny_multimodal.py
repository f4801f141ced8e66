"""Tiny random models that take images, one of each kind that planish knows, and inputs with an image for most of them."""

from pathlib import Path
from typing import Any

import torch
from helpers_compress import VOCABULARY, store
from tiny_models import CONFIGS, RELATIVES, random_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, START = VOCABULARY - 1, VOCABULARY - 2  # tokens
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
_QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4}
_QWEN_WIDE = {**_QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": START - 1, "vision_start_token_id": START, "vision_end_token_id": START - 2}


def _text(family: str, **changes: Any) -> dict[str, Any]:
    return {**(CONFIGS | RELATIVES)[family], "vocab_size": VOCABULARY, **changes}


def _turned(kind: str, sections: list[int], **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    return _text("qwen2", model_type=kind, rope_parameters=rope, tie_word_embeddings=False, **changes)


CONFIGS_WITH_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text("gemma3_text"),
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": _text("mistral", head_dim=16),
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
    },
    "llava": {"text_config": _text("llama"), "vision_config": {**_VISION, "model_type": "clip_vision_model"}, "image_token_index": IMAGE},
    "llava_next": {
        "text_config": _text("mistral"),
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[16, 16]],
    },
    "llava_onevision": {
        "text_config": _text("qwen2"),
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[16, 16]],
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {**_VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "qwen2_vl": {
        "text_config": _turned("qwen2_vl_text", [2, 3, 3]),
        "vision_config": {**_QWEN, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": _turned("qwen2_5_vl_text", [2, 3, 3]),
        "vision_config": {**_QWEN_WIDE, "window_size": 16, "fullatt_block_indexes": [0]},
        **_TOKENS,
    },
    "qwen3_vl": {
        "text_config": _turned("qwen3_vl_text", [4, 2, 2], head_dim=16),
        "vision_config": {**_QWEN_WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_TOKENS,
    },
    "qwen3_5": {"text_config": _text("qwen3_5_text"), "vision_config": {**_QWEN_WIDE, "num_position_embeddings": 16}, **_TOKENS},
    "qwen3_5_moe": {"text_config": _text("qwen3_5_moe_text"), "vision_config": {**_QWEN_WIDE, "num_position_embeddings": 16}, **_TOKENS},
    "smolvlm": {
        "text_config": _text("llama"),
        "vision_config": {**_VISION, "model_type": "smolvlm_vision"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "lfm2_vl": {
        "text_config": _text("lfm2"),
        "vision_config": {**_VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
        "image_token_id": IMAGE,
        "projector_hidden_size": 32,
    },
}
_NOT_TRIED = ("llava_next", "llava_onevision", "smolvlm", "lfm2_vl")
SEEING = {kind: 16 if kind == "llava" else 4 for kind in CONFIGS_WITH_IMAGES if kind not in _NOT_TRIED}  # tokens of an image


def with_images(kind: str, folder: Path) -> Path:
    """The checkpoint of one, in bfloat16, under the names that transformers writes."""
    config = AutoConfig.for_model(kind, **CONFIGS_WITH_IMAGES[kind])
    return store(random_weights(AutoModelForImageTextToText.from_config(config), 0), folder)


def seen(kind: str) -> dict[str, Tensor]:
    """A text with an image in it, for the forward pass of a model of SEEING."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, START - 5, (14,), generator=generator)
    ids = torch.cat([words[:5], torch.tensor([START]), torch.full((SEEING[kind],), IMAGE), words[5:]])[None]
    if kind.startswith("qwen"):
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    more = {"gemma3": {"token_type_ids": (ids == IMAGE).long()}, "mistral3": {"image_sizes": torch.tensor([[16, 16]])}}
    return inputs | more.get(kind, {})
