"""A pretrained model on disk: opened with every check that needs no weights, then read one module at a time.

Names of tensors are the names of the model's parameters in transformers; where a checkpoint has them otherwise (with or without the base model's
prefix, or an older name), TensorInfo.name is the name in the file.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...quant.errors import PlanishError
from ..blocks.experts import separate
from ..blocks.families import FAMILIES, around_unknown, family_of
from ..blocks.prefix import PrefixCache
from .convert import REJECTED
from .locate import TOKENIZER_FILES, resolve, side_files, weight_files
from .naming import match_names
from .shards import CHUNK_BYTES, TensorInfo, read_chunks, read_json, read_shards, read_tensor

SAMPLE_BYTES = 4096
EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00), torch.float32: (torch.int32, 0x7F800000)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked, unquantized model on disk. Made by `open_checkpoint`.

    tensors: every parameter and stored buffer by its name in the model. aliases: tied parameters that are not stored, each with the one it equals.
    unused: names in the files that the model has no place for, known leftovers (rotary frequencies, causal masks) aside.
    """

    path: Path
    config: PreTrainedConfig
    tensors: dict[str, TensorInfo] = field(repr=False)
    aliases: dict[str, str]
    unused: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, float16 or float32: the dtype that holds most of the bytes."""
        sizes = Counter[torch.dtype]()
        for info in self.tensors.values():
            sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0]

    @property
    def tied(self) -> bool:
        """Whether parameters share one tensor (the head and the embedding)."""
        return bool(self.aliases)

    def info(self, name: str) -> TensorInfo:
        """Where a parameter lies, tied ones included."""
        return self.tensors[self.aliases.get(name, name)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies in the stored dtype, on the CPU. Resident memory grows by these tensors and nothing else."""
        return {name: read_tensor(self.info(name)) for name in names}

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model in eval mode with every parameter on the meta device; buffers that are computed (rotary frequencies) are real.

        dtype: what the model will compute in (default: the stored one); it fixes the precision of computed constants such as Gemma's embedding scale.
        """
        return build_skeleton(self.config, dtype or self.dtype, self.path)

    def load_module(self, module: nn.Module, prefix: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """Give a part of the skeleton its real weights, in place.

        prefix: the module's path in the model ("" for the whole model). dtype: of the parameters (default: as stored). Computed buffers keep theirs
        and move to the device. At most one tensor is held besides the module's own.
        """
        root = f"{prefix}." if prefix else ""
        for owner_name, owner in module.named_modules():
            path = f"{root}{owner_name}." if owner_name else root
            for name in owner._parameters:
                if owner._parameters[name] is not None:
                    value = read_tensor(self.info(path + name)).to(device, dtype)
                    owner._parameters[name] = nn.Parameter(value, requires_grad=False)
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    stored = self.tensors.get(path + name)
                    owner._buffers[name] = buffer.to(device) if stored is None else read_tensor(stored).to(device, buffer.dtype)

    def prefix_cache(self, dtype: torch.dtype, device: torch.device | str) -> PrefixCache | None:
        """What stands before every text; None, for only planish's own checkpoints have it."""
        return None

    def original_stream(self, hidden: Tensor) -> Tensor:
        """The residual stream in the basis in which the model was trained: massive activations stand out in it. (..., D)."""
        return hidden

    @staticmethod
    def release(module: nn.Module) -> None:
        """Put all parameters of a loaded module back on the meta device, in place; their memory is free when nobody else holds them."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Errors: its files are missing or broken (a tokenizer that needs code from the model's folder is not run)."""
        check_language(self, "read text with it")
        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise PlanishError(f"{self.path}: no tokenizer. Looked for {', '.join(TOKENIZER_FILES)}. Copy the tokenizer's files there.")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (self.path / name).exists():
                read_json(self.path / name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except REJECTED as error:
            raise PlanishError(f"{self.path}: the tokenizer cannot be loaded: {error}") from error
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    def carry_over(self) -> tuple[Path, ...]:
        """The side files that a compressed checkpoint takes over unchanged (tokenizer, chat template, licence, ...), relative to `path`."""
        return side_files(self.path)

    def check_finite(self, report: Callable[[int, int], None] | None = None) -> None:
        """Read every weight once, in a buffer of 1 MB; raise PlanishError at the first tensor with NaN or infinity.

        report: called with the bytes done and the bytes there are, after every MB.
        """
        buffer, done, total = torch.empty(CHUNK_BYTES, dtype=torch.uint8), 0, self.nbytes
        for info in sorted(self.tensors.values(), key=lambda info: (info.file, info.offset)):
            nans = infinities = 0
            for piece in read_chunks(info, buffer):
                if not _finite(piece):
                    nans += int(piece.isnan().sum())
                    infinities += int(piece.isinf().sum())
                done += piece.nbytes
                if report is not None:
                    report(done, total)
            if nans or infinities:
                message = f"tensor {info.name} has {nans} NaN and {infinities} infinite values of {info.nbytes // info.dtype.itemsize}"
                raise PlanishError(f"{info.file}: {message}. The weights are broken: download or export them again.")

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config.json and, for each tensor, its name, dtype, shape, and first and last 4096 bytes: cheap at any size.

        The same content in another folder or in other shards gives the same digest. It is no proof of integrity: a change inside a large tensor,
        away from its ends, is not seen.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            with info.file.open("rb", buffering=0) as file:
                for start in (0, max(0, info.nbytes - SAMPLE_BYTES)):
                    file.seek(info.offset + start)
                    digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
        return digest.hexdigest()


def open_checkpoint(model: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model: a local folder, a Hub name (org/name), a .gguf file, or demo:NAME (demo.py).

    Reads the configuration and the headers of the weight files, not the weights. Errors, each one PlanishError: no such model; config.json missing,
    broken, of an unknown architecture or of a quantized model; weight files missing, truncated or with a wrong header; pickles that are not allowed;
    parameters that are missing, have other shapes than the configuration says, or are not bfloat16, float16 or float32.
    """
    folder = resolve(model, allow_pickle=allow_pickle)
    config = _read_config(folder)
    stored = read_shards(weight_files(folder, allow_pickle=allow_pickle))
    match = match_names(folder, stored, build_skeleton(config, torch.float32, folder))
    if match.untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return Checkpoint(path=folder, config=config, tensors=match.tensors, aliases=match.aliases, unused=match.unused)


def check_language(checkpoint: Checkpoint, purpose: str) -> None:
    """PlanishError if the checkpoint is a vision model. purpose: what was asked for that only language models can do, as a verb phrase."""
    family = family_of(checkpoint.config)
    if family is not None and family.input != "input_ids":
        raise PlanishError(
            f"{checkpoint.path}: a vision model ({checkpoint.config.model_type}), so planish cannot {purpose}: "
            "that is for language models so far. `planish inspect` takes vision models too."
        )


def _finite(piece: Tensor) -> bool:
    """Whether a flat piece has neither NaN nor infinity, whose exponents alone have all bits set.

    numpy and not torch: torch's isfinite is many times slower than the read, and its thread pool stalls where other programs keep the cores busy.
    """
    integer, exponent = EXPONENTS[piece.dtype]
    return bool((piece.view(integer).numpy() & exponent).max() < exponent)


def _read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    values = read_json(path)
    for key in ("quantization_config", "compression_config"):
        if values.get(key):
            raise PlanishError(f"{path}: has a {key}: this model is already quantized. Give the original model in bfloat16, float16 or float32.")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except REJECTED as error:
        raise PlanishError(f"{path}: {_unknown(values)} ({error})") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """The model that a configuration describes, in eval mode, its parameters on the meta device; without a head where the family has none.

    folder: named in errors.
    """
    family = family_of(config)
    options = {} if family is None or family.head is not None else dict(family.options)
    try:
        with _parameters_on_meta():
            # None: sdpa where the family has it, else eager (Gemma 2). The configuration is copied because from_config writes into it.
            model = auto_class(config).from_config(copy.deepcopy(config), attn_implementation=None, dtype=dtype, trust_remote_code=False, **options)
    except REJECTED as error:
        why = around_unknown(config) or f"{_unknown(config.to_dict())} ({str(error).partition(chr(10))[0]})"
        raise PlanishError(f"{folder / 'config.json'}: {why}") from error
    assert isinstance(model, PreTrainedModel)
    separate(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.train(False)
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers whose from_pretrained opens a model of this config with all that planish knows of it."""
    family = family_of(config)
    if family is not None and family.body:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if family is None or family.head is not None else AutoModel


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made inside have no memory; buffers, which no file holds, have."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _unknown(values: dict[str, object]) -> str:
    kind = f"model_type {values.get('model_type')!r}, architectures {values.get('architectures')!r}"
    family = FAMILIES.get(str(values.get("model_type")))
    what = "vision encoder" if family is not None and family.head is None else "causal language model"
    return f"transformers builds no {what} from this configuration: {kind}. Check the file, or update transformers."
