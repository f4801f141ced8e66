"""Other weight files to safetensors, once, into the cache: GGUF files through transformers, and pickles where the user allows them."""

import errno
import importlib.util
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ...quant.errors import PlanishError
from .cache import build_once, content_hash

# What transformers raises on files that it cannot use: it has no exception of its own.
REJECTED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, ImportError, StrictDataclassError)
SHORT = ("cannot reshape array of size", "When changing to a larger dtype")  # what numpy says of too few bytes
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # no fault of the file that is read


def convert_gguf(path: Path, card: str | None = None) -> Path:
    """A bfloat16 checkpoint folder with the dequantized weights and the tokenizer of a GGUF file. The whole model is in memory while this is done.

    card: text of the folder's README.md. Errors: not a GGUF file, or a truncated one; an architecture that transformers cannot dequantize; the
    package gguf is missing.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise PlanishError(f"{path}: not a GGUF file (it does not begin with GGUF). Download it again.")
    if importlib.util.find_spec("gguf") is None:
        raise PlanishError(f"{path}: reading GGUF files needs the package gguf. Run: pip install 'planish[gguf]'")

    def build(folder: Path) -> None:
        try:
            _dequantize(path, folder)
        except (*REJECTED, struct.error) as error:
            if isinstance(error, OSError) and error.errno in MACHINE:
                raise
            if _cut(error):
                raise PlanishError(f"{path}: seems truncated: it ends amid its numbers. Download it again.") from error
            raise PlanishError(f"{path}: transformers cannot dequantize this GGUF file: {error}. Use the model's safetensors checkpoint.") from error
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    return build_once(f"{path.stem}-{content_hash([path])}", build)


def _cut(error: Exception) -> bool:
    """Whether that is how the package gguf fails on a file that ends too early: amid its metadata, or amid the numbers of a tensor."""
    return isinstance(error, struct.error) or (isinstance(error, ValueError) and str(error).startswith(SHORT))


def _dequantize(path: Path, folder: Path) -> None:
    source, name = str(path.parent), path.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def convert_pickles(files: Iterable[Path]) -> list[Path]:
    """Safetensors files with the tensors of PyTorch pickle files (.bin), one for each. Only tensors are unpickled; code in the file is never run.

    Errors: a file is missing, is no state dict of dense tensors, or holds anything but tensors.
    """
    pickles = sorted(files)
    for path in pickles:
        if not path.is_file():
            raise PlanishError(f"{path}: no such file, but the checkpoint needs it. Download the missing file.")

    def build(folder: Path) -> None:
        for path in pickles:
            save_file(_unpickle(path), folder / f"{path.stem}.safetensors", metadata={"format": "pt"})

    folder = build_once(f"{pickles[0].parent.name}-{content_hash(pickles)}", build)
    return [folder / f"{path.stem}.safetensors" for path in pickles]


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise PlanishError(f"{path}: not readable as PyTorch weights ({type(error).__name__}). Download it again, or use safetensors.") from error
    if not isinstance(state, dict):
        raise PlanishError(f"{path}: holds a {type(state).__name__}, not a dict of tensors. Save the model's state_dict(), or use safetensors.")
    tensors, storages = {}, set[int]()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise PlanishError(f"{path}: {name} is no dense tensor. Save the model's state_dict(), or use safetensors.")
        dense = value.detach().contiguous()
        storage = dense.untyped_storage().data_ptr()
        tensors[str(name)] = dense.clone() if storage in storages else dense
        storages.add(storage)
    return tensors
