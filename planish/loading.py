"""A model in memory, ready to run, from a compressed checkpoint or an ordinary one."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from .auto_loading import PlanishConfig, PlanishQuantizer
from .calib.precision import pick_device
from .calib.prefixed import attach
from .calib.stored import StoredCheckpoint, open_any


def load(model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> PreTrainedModel:
    """The transformers model of a checkpoint, in eval mode, with all its weights: for forward passes and generate().

    model: a folder that planish compress wrote, or anything that compress takes. dtype: of the arithmetic (default: as stored); quantized linears
    compute with their integer codes, exactly as they were measured. device: default cuda where there is one, else cpu. The whole model is in memory,
    quantized weights one code an element of dtype; it does not train, and is saved by copying the folder. Raises PlanishError.
    """
    checkpoint = open_any(model)
    where = pick_device(device)
    loaded = checkpoint.skeleton(dtype)
    checkpoint.load_module(loaded, "", dtype=dtype or checkpoint.dtype, device=where)
    loaded.tie_weights()
    if isinstance(checkpoint, StoredCheckpoint):  # so that transformers neither saves it without its weights nor compiles it in generate()
        loaded.hf_quantizer = PlanishQuantizer(PlanishConfig(), pre_quantized=True)  # type: ignore[assignment]
    if (prefix := checkpoint.prefix_cache(dtype or checkpoint.dtype, where)) is not None:
        attach(loaded, prefix)
    if (checkpoint.path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
    return loaded
