"""transformers' from_pretrained for checkpoints of planish's own (quant_method "planish"): quantized linears, transforms of inputs, the prefix.

transformers loads all that is not quantized; what is comes from the same code as in planish.load, so both compute the same.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from ..quant.errors import PlanishError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calib.compressed.stored import StoredCheckpoint

METHOD = "planish"


class PlanishConfig(QuantizationConfigMixin):
    """quantization_config of such a checkpoint, as it is written; nothing in it can be set."""

    def __init__(self, **values: Any) -> None:
        values["quant_method"] = METHOD
        vars(self).update(values)
        self.quant_method = METHOD  # type: ignore[assignment, unused-ignore]


class PlanishQuantizer(HfQuantizer):
    """Puts the quantized linears where from_pretrained has made ordinary ones, and the prefix before all texts."""

    requires_calibration = True  # weights that are not quantized yet are `planish compress`'s

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint: StoredCheckpoint | None = None

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_kwargs: Any) -> None:
        from ..calib.blocks.experts import separate
        from ..calib.compressed.quantized import put
        from ..calib.compressed.stored import open_stored

        if not checkpoint_files:
            raise PlanishError("from_pretrained: no weight files, and a checkpoint of planish is not made of a state_dict. Give its folder.")
        self.checkpoint = open_stored(Path(checkpoint_files[0]).parent)
        separate(model)
        self.root = _root(model, self.checkpoint)
        for name in self.checkpoint.packed:
            put(model, name.removeprefix(self.root), _Place() if self.checkpoint.own else nn.Identity())
        linears = "|".join(re.escape(name.removeprefix(self.root)) for name in self.checkpoint.packed)
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, r"\.planish\.", rf"^({re.escape(self.root)})?({linears})\."}

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Without those that make one tensor of several layers: the model has a layer for each expert, and files may call it otherwise."""
        from transformers.core_model_loading import MergeModulelist, WeightRenaming

        from ..calib.blocks.families import FAMILIES

        kept = [one for one in weight_conversions if not any(isinstance(step, MergeModulelist) for step in getattr(one, "operations", ()))]
        family = FAMILIES.get(model.config.model_type)
        return [*kept, *(WeightRenaming(re.escape(file), part) for part, file in (() if family is None else family.in_files))]

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_kwargs: Any) -> "PreTrainedModel":
        from ..calib.compressed.packed import fuse, pick_kernels, put_linears
        from ..calib.compressed.prefixed import attach

        assert self.checkpoint is not None
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1 or "disk" in places:
            raise PlanishError(f"device_map: the model would lie in {', '.join(sorted(places))}, and planish runs it in one place. Give one device.")
        whole = next(parameter for parameter in model.parameters() if parameter.numel())
        device, dtype = whole.device, whole.dtype
        if pick_kernels("auto", dtype, device):
            put_linears(model, self.checkpoint, self.root, dtype, device)
            fuse(model, self.checkpoint.config, self.root, dtype)
        else:
            self.checkpoint.load_quantized(model, self.root, dtype, device)
        if (prefix := self.checkpoint.prefix_cache(dtype, device)) is not None:
            attach(model, prefix)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """No: a checkpoint is saved by copying its folder."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """No."""
        return False


class _Place(nn.Module):
    """Stands where a quantized linear will, while transformers loads the rest: its weight is the checkpoint's empty one (packing.GUARD)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _root(model: "PreTrainedModel", checkpoint: "StoredCheckpoint") -> str:
    """What the checkpoint's names begin with, and the model's do not: where the model is the other's body, without its head."""
    from ..calib.files.checkpoint import auto_class

    modules, root = dict(model.named_modules()), f"{model.base_model_prefix}."
    if all(name in modules for name in checkpoint.packed):
        return ""
    if all(name.startswith(root) and name.removeprefix(root) in modules for name in checkpoint.packed):
        return root
    auto = auto_class(checkpoint.config).__name__
    raise PlanishError(f"{checkpoint.path}: its layers are not those of a {type(model).__name__}. Load it with {auto} or planish.load.")


class ServedConfig(CompressedTensorsConfig):
    """transformers' own, but for mixtures of experts as planish writes them, which it would not load."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A PlanishConfig, or transformers' own."""
        from ..calib.compressed.packing import has_experts

        made_by: Any = PlanishConfig if has_experts(config_dict) else CompressedTensorsConfig
        return made_by.from_dict(config_dict, return_unused_kwargs, **kwargs)


def register_quantizer() -> None:
    """Let from_pretrained know these classes. Harmless if done already."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(PlanishConfig)
        auto.register_quantizer(METHOD)(PlanishQuantizer)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = ServedConfig
