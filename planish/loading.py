"""A model in memory, ready to run, from a compressed checkpoint or an ordinary one."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from .auto_loading import PlanishConfig, PlanishQuantizer
from .calib.precision import pick_device
from .calib.prefixed import attach
from .calib.stored import StoredCheckpoint, open_any
from .calib.topology import topology
from .packed_loading import load_packed
from .quant.errors import PlanishError

KERNELS = ("reference", "packed", "compiled")


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None, kernels: str = "reference"
) -> PreTrainedModel:
    """The transformers model of a checkpoint, in eval mode, with all its weights: for forward passes and generate().

    model: a folder that planish compress wrote, or anything that compress takes. dtype: of the arithmetic (default: as stored); quantized linears
    compute with their integer codes, exactly as they were measured. device: default cuda where there is one, else cpu. The whole model is in memory,
    quantized weights one code an element of dtype; it does not train, and is saved by copying the folder. Raises PlanishError.

    kernels: "reference"; "packed": by quant.kernels, the readers of one input as one product, equal to the reference but for rounding; "compiled":
    packed, and blocks compiled by torch.compile at the first call, which takes seconds and a C++ compiler (on a CPU; on a GPU Triton). Calls with a
    cache of keys and values are not compiled: each block would be, for its own place in the cache.
    """
    checkpoint = open_any(model)
    where = pick_device(device)
    if kernels not in KERNELS:
        raise PlanishError(f"kernels is {kernels!r}, but must be one of {', '.join(KERNELS)}.")
    loaded = checkpoint.skeleton(dtype)
    if isinstance(checkpoint, StoredCheckpoint) and kernels != "reference":
        load_packed(loaded, checkpoint, dtype or checkpoint.dtype, where)
    else:
        checkpoint.load_module(loaded, "", dtype=dtype or checkpoint.dtype, device=where)
    loaded.tie_weights()
    head = loaded.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        head.register_forward_pre_hook(_folds)
    if isinstance(checkpoint, StoredCheckpoint):  # so that transformers neither saves it without its weights nor compiles it in generate()
        loaded.hf_quantizer = PlanishQuantizer(PlanishConfig(), pre_quantized=True)  # type: ignore[assignment]
    if (prefix := checkpoint.prefix_cache(dtype or checkpoint.dtype, where)) is not None:
        attach(loaded, prefix)
    if (checkpoint.path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
    if kernels == "compiled":
        for block in loaded.get_submodule(topology(checkpoint.config).blocks).children():
            block.forward = _without_cache(block.forward, torch.compile(block.forward))
    return loaded


def _without_cache(plain: Callable[..., object], compiled: Callable[..., object]) -> Callable[..., object]:
    """A block's forward: compiled where no cache is given."""

    @functools.wraps(plain)
    def forward(*args: object, **kwargs: object) -> object:
        return (compiled if kwargs.get("past_key_values") is None else plain)(*args, **kwargs)

    return forward


def _folds(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head's input such that torch multiplies it as one matrix. Without gradients it would otherwise, for the last token's slice of a prompt,
    expand the head's weight to a batch: a copy of the whole vocabulary, half of a prefill's time."""
    x = inputs[0]
    folds = x.dim() < 3 or all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    return (x if folds else x.clone(memory_format=torch.contiguous_format), *inputs[1:])
