"""Checkpoint folders to open and to break."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny, whole
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.shards import INDEX_FILE
from planish.quant.errors import PlanishError


def llama(folder: Path) -> Path:
    """A tiny tied Llama in bfloat16, in several shards, with a tokenizer."""
    save(tiny("llama").to(torch.bfloat16), folder, shard="40KB")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def save(model: PreTrainedModel, folder: Path, shard: str = "1GB") -> None:
    model.config.dtype = model.dtype
    whole(model).save_pretrained(folder, max_shard_size=shard)


def merge(folder: Path) -> dict[str, Tensor]:
    """Replace the shards of a folder by one file; its tensors."""
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: value.clone() for shard in shards for name, value in load_file(shard).items()}
    for path in (*shards, folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    rewrite(folder, tensors)
    return tensors


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model: Path | str, *words: str, **options: bool) -> None:
    with pytest.raises(PlanishError) as caught:
        open_checkpoint(model, **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
