"""Text that a model writes itself, to be calibrated on: what it knows, in its own words, so that no domain of a chosen text is favoured.

(LLM-QAT, Liu et al. 2023, arXiv:2305.17888, section 3.1, trains on such text. There a first token is drawn from the whole vocabulary and the next
three to five are the likeliest; here every sample begins a document, and all tokens are drawn as the model has them likely.)

Written once, and kept in the cache folder: the same model, settings and machine give the same tokens again.
"""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..files.cache import build_once, kept
from ..files.checkpoint import Checkpoint
from ..machine.precision import working_dtype
from .windows import start_token

SOURCE = "model"
BATCH = 32  # samples written at once
TOP_P = 0.98  # of the distribution of a next token; what is beyond is mostly noise
FILE = "ids.safetensors"


def own_text(checkpoint: Checkpoint, samples: int, length: int, seed: int, device: torch.device) -> Tensor:
    """(samples, length) int64. The whole model is in memory while it writes, and its keys and values of BATCH samples."""

    def build(folder: Path) -> None:
        logging.getLogger(__name__).info("the model writes %d x %d tokens to be calibrated on", samples, length)
        save_file({"ids": _written(checkpoint, samples, length, seed, device)}, folder / FILE)

    return load_file(build_once(_name(checkpoint, samples, length, seed), build) / FILE)["ids"]


def is_written(checkpoint: Checkpoint, samples: int, length: int, seed: int) -> bool:
    """Whether it is in the cache already, so that nothing is to be written."""
    return kept(_name(checkpoint, samples, length, seed)).is_dir()


def _name(checkpoint: Checkpoint, samples: int, length: int, seed: int) -> str:
    return f"text-{checkpoint.fingerprint()[:16]}-{samples}x{length}-{seed}"


@torch.no_grad()
def _written(checkpoint: Checkpoint, samples: int, length: int, seed: int, device: torch.device) -> Tensor:
    model = _model(checkpoint, device)
    start = start_token(checkpoint.tokenizer())
    plain = GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        do_sample=True, temperature=1.0, top_k=0, top_p=TOP_P, max_new_tokens=length, eos_token_id=None, pad_token_id=0
    )
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, samples, BATCH):
            begun_N1 = torch.full((min(BATCH, samples - first), 1), start or 0, device=device)
            found = model.generate(begun_N1, attention_mask=torch.ones_like(begun_N1), generation_config=plain)  # type: ignore[operator, unused-ignore]
            assert isinstance(found, Tensor)
            parts.append(found[:, 1:].cpu())
    return torch.cat(parts).contiguous()


def _model(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    dtype = working_dtype(checkpoint.dtype, device)
    model = checkpoint.skeleton(dtype)
    checkpoint.load_module(model, "", dtype=dtype, device=device)
    model.tie_weights()
    return model
