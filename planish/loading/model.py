"""A model in memory, ready to run, from a compressed checkpoint or an ordinary one."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..calib.compressed.packed import Kernels, fuse, pick_kernels, put_linears
from ..calib.compressed.prefixed import attach
from ..calib.compressed.stored import StoredCheckpoint, open_any
from ..calib.files.checkpoint import Checkpoint
from ..calib.machine.device import pick_device
from .auto import PlanishConfig, PlanishQuantizer


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kernels: Kernels = "auto",
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """The transformers model of a checkpoint, in eval mode, with all its weights: for forward passes and generate().

    model: a folder that planish compress wrote, or anything that compress takes (.bin weights with allow_pickle). dtype: of the arithmetic
    (default: as stored). device: default cuda where there is one, else cpu. kernels: reference computes with the integer codes exactly as they were
    measured, one code an element of dtype in memory; packed computes the same but for rounding, faster and in less memory, on the device that it was
    loaded to; auto is what the environment's PLANISH_KERNELS says, else packed in bfloat16 on a CPU (AVX2, and a C++ compiler) and in 16 bits on
    CUDA with Triton, else reference. kernels_used(model) says what runs on what.
    The whole model is in memory; it does not train, and is saved by copying the folder. Raises PlanishError.
    """
    where = pick_device(device)
    with torch.device("cpu"):  # whatever torch's default is: what is read and prepared lies there
        return _loaded(open_any(model, allow_pickle=allow_pickle), dtype, where, kernels)


def _loaded(checkpoint: Checkpoint, dtype: torch.dtype | None, where: torch.device, kernels: Kernels) -> PreTrainedModel:
    loaded, whole = checkpoint.skeleton(dtype), dtype or checkpoint.dtype
    packed = pick_kernels(kernels, whole, where)
    if isinstance(checkpoint, StoredCheckpoint) and packed:
        put_linears(loaded, checkpoint, "", whole, where)
        Checkpoint.load_module(checkpoint, loaded, "", dtype=whole, device=where)
        fuse(loaded, checkpoint.config, "", whole)
    else:
        checkpoint.load_module(loaded, "", dtype=whole, device=where)
    loaded.tie_weights()
    if (head := loaded.get_output_embeddings()) is not None:  # type: ignore[no-untyped-call]
        head.register_forward_pre_hook(_dense)
    if isinstance(checkpoint, StoredCheckpoint):  # so that transformers neither saves it without its weights nor compiles it in generate()
        loaded.hf_quantizer = PlanishQuantizer(PlanishConfig(), pre_quantized=True)  # type: ignore[assignment]
    if (prefix := checkpoint.prefix_cache(whole, where)) is not None:
        attach(loaded, prefix)
    if (checkpoint.path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
    return loaded


def _dense(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last token's row of (B, T, C) has strides for which torch, where no weight has a gradient, first copies the head's whole weight."""
    return tuple(x.clone(memory_format=torch.contiguous_format) if x.dim() == 3 and x.stride(0) != x.shape[1] * x.stride(1) else x for x in inputs)
