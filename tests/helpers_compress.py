"""Tiny models with a tokenizer, and shipped recipes made quick."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers_text import build_tokenizer
from tiny_models import tiny, whole
from torch import Tensor
from transformers import PreTrainedModel

from planish.recipe.schema import Recipe, load_recipe, with_settings

VOCABULARY = 400
STEPS = {  # every step that transforms, as a recipe has it
    "fold_norms": "fold_norms",
    "untie": "untie",
    "smooth": "smooth: {strength: 0.5}",
    "scale_rms": "scale_rms: {exponent: 0.7}",
    "shift": "shift",
    "permute": "permute: {block: 4}",
    "R1": "fold_norms, rotate: {at: residual}",
    "R1, orthogonal": "fold_norms, rotate: {at: residual, kind: orthogonal}",
    "R1, learned": "fold_norms, rotate: {at: residual, kind: learned, steps: 2}",
    "R2": "rotate: {at: value}",
    "R2, learned": "rotate: {at: value, kind: learned, steps: 2}",
    "R2'": "rotate: {at: heads}",
    "hadamard": "hadamard: {seeds: 2}",
    "duquant": "duquant: {block: 16, steps: 8}",
    "smoothrot": "scale_rms: {exponent: 0.5}, hadamard",
    "cat": "cat: {block: 16}",
    "cat, whole": "cat: {block: 576}",
    "wush": "wush: {block: 16}",
    "flat": "flat: {steps: 4}",
    "flat, whole block": "flat: {objective: block, steps: 4}",
    "auto": "auto",
    "quad": "quad: {rank: 4}",
    "resq": "resq: {share: 0.25}",
}
QUICK = ("calibration.samples=4", "calibration.length=32", "calibration.batch_size=2")


def source(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, changes: Mapping[str, Any] | None = None, shard: str = "1GB") -> Path:
    """The checkpoint of a tiny model, whose vocabulary is that of its tokenizer."""
    return store(tiny(family, changes={"vocab_size": VOCABULARY, **(changes or {})}), folder, dtype, shard)


def store(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB") -> Path:
    model = model.to(dtype)
    model.config.dtype = dtype
    whole(model).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


def outlying(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model whose norms make a few channels large, and whose tokens are alike: inputs that are correlated and hard to quantize."""
    model = tiny(family, changes={"vocab_size": VOCABULARY})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += torch.randn(VOCABULARY, 4, generator=generator) @ torch.randn(4, embedding.shape[1], generator=generator) * 0.3
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[::9] *= 15
            elif "mlp.up_proj" in name:
                parameter[::11] *= 15
    return store(model, folder, dtype)


def quick(name: str, *settings: str) -> Recipe:
    """A shipped recipe with little calibration text."""
    return with_settings(load_recipe(name), (*QUICK, *settings))


def ids(samples: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(3))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius norms."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
