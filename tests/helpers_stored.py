"""Compressed checkpoints made without calibration: every block linear rounded to nearest."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import whole
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from planish.calib.blocks.families import name_in_files
from planish.calib.blocks.topology import reader_weight
from planish.calib.compressed.packing import Packed, default_layout, pack, quantization_config
from planish.calib.files.checkpoint import Checkpoint, open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.quant.formats import Scheme
from planish.quant.linear import StaticGrid
from planish.quant.solvers import Rtn


def saved(model: PreTrainedModel, folder: Path, tokenizer: bool = False) -> Path:
    """The model's checkpoint; with a tokenizer of one token a character."""
    whole(model).save_pretrained(folder)
    if tokenizer:
        vocabulary = {chr(32 + i): i for i in range(model.config.vocab_size)}
        core = Tokenizer(WordLevel(vocabulary, unk_token=" "))
        core.pre_tokenizer = Split(Regex("."), "isolated")
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token=" ").save_pretrained(folder)
    return folder


def rounded(source: Path, folder: Path, scheme: Scheme, static: StaticGrid | None = None) -> Path:
    """A checkpoint of `source` with the linears of all blocks quantized. static: one grid for all inputs, if the scheme has a static one."""
    checkpoint = open_checkpoint(source)
    runner = BlockRunner(checkpoint, torch.float32, torch.device("cpu"))
    how = Packed(scheme, default_layout(scheme))
    tensors: dict[str, Tensor] = checkpoint.read(checkpoint.tensors)
    packed: dict[str, Packed] = {}
    for index in range(runner.topology.block_count):
        block = runner.load_block(index)
        for path, module in block.named_modules():
            if isinstance(module, Linear | Conv1D):
                name = f"{runner.block_name(index)}.{path}"
                assert scheme.weights is not None
                weight = Rtn().solve(reader_weight(module), scheme.weights, None, torch.bfloat16).weight
                del tensors[f"{name}.weight"]
                tensors.update({f"{name}.{local}": tensor for local, tensor in pack(weight, how.layout, torch.bfloat16, static).items()})
                packed[name] = how
        runner.release_block(index)
    write(checkpoint, folder, tensors, packed)
    return folder


def write(checkpoint: Checkpoint, folder: Path, tensors: dict[str, Tensor], packed: dict[str, Packed]) -> None:
    folder.mkdir()
    in_files = partial(name_in_files, checkpoint.config.model_type)
    tensors, packed = ({in_files(name): value for name, value in part.items()} for part in (tensors, packed))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((checkpoint.path / "config.json").read_text())
    values["quantization_config"] = quantization_config(packed, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(values))
    for name in checkpoint.carry_over():
        shutil.copy(checkpoint.path / name, folder / name)
