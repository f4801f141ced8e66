"""How vLLM loads and runs a checkpoint of planish: which layers are whose, and what they compute."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.fused_moe import RoutedExperts  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from ..calib.blocks.families import is_mixture, name_in_files, name_in_model
from ..calib.blocks.family import EXPERTS
from ..calib.blocks.topology import topology
from ..calib.compressed.packed import packed_readers, pick_kernels
from ..calib.compressed.packing import PLAIN
from ..calib.compressed.stored import StoredCheckpoint, open_stored
from ..quant.errors import PlanishError
from ..quant.kernels.cpu import exact
from ..quant.kernels.joined import Part
from ..quant.linear import Parts, QuantizedLinear, share_input
from . import METHOD, VLLM_FAMILIES
from .vllm_experts import PlanishExpertsMethod, quantized_experts
from .vllm_operators import put_layer, run_linears
from .vllm_prefix import store_prefix
from .vllm_ranks import cut, first_row, own_rows, whole_input

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM computes at once, where the class of a model does not say what it calls so."""


class PlanishConfig(QuantizationConfig):  # type: ignore[misc, unused-ignore]
    """A checkpoint that planish wrote, by its folder. It travels between vLLM's processes, so the files are opened where they are needed."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        super().__init__()
        self.quantization = dict(quantization)
        self.folder: str | None = None
        self.mappers: list[WeightsMapper] = []

    def get_name(self) -> str:
        """planish."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the arithmetic."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, for bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PlanishConfig":
        """Of config.json's quantization_config."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> str | None:
        """Also compressed-tensors in plain layout with activations where they or the weights have fewer than 8 bits: vLLM itself refuses such
        activations, and W4A8 on GPUs; mixtures of experts on CPUs, where it has kernels for few; integers on CPUs whose products of bytes oneDNN gets
        wrong, and vLLM with it. All of compressed-tensors where the user asks for planish."""
        if not isinstance(hf_quant_cfg, dict) or hf_quant_cfg.get("quant_method") != PLAIN or user_quant not in (None, METHOD):
            return None
        family = getattr(hf_config, "model_type", "")
        groups = [group for group in (hf_quant_cfg.get("config_groups") or {}).values() if isinstance(group, dict)]
        wrong = family in VLLM_FAMILIES and any((group.get("weights") or {}).get("type") == "int" for group in groups) and not exact()
        if user_quant == METHOD or (current_platform.is_cpu() and ((hf_config is not None and is_mixture(hf_config)) or wrong)):
            return METHOD
        pairs = [(group.get("weights") or {}, group.get("input_activations")) for group in groups]
        narrow = any(act and act.get("type") == "int" and min(act.get("num_bits", 8), fmt.get("num_bits", 8)) < 8 for fmt, act in pairs)
        return METHOD if narrow and all(group.get("format") == "int-quantized" for group in groups) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Told where the checkpoint is, and of what family. PlanishError: not a local folder, or a family that is not served."""
        if not Path(model_name).is_dir():
            raise PlanishError(
                f"{model_name}: planish serves local folders. Download it (hf download {model_name} --local-dir FOLDER), and give FOLDER."
            )
        if hf_config is not None and hf_config.model_type not in VLLM_FAMILIES:
            raise PlanishError(
                f"{model_name}: a {hf_config.model_type}, and in vLLM planish runs {', '.join(VLLM_FAMILIES)} so far. Use planish.load."
            )
        self.folder = model_name
        if self.checkpoint.extension.held is not None:
            raise PlanishError(f"{model_name}: keys and values are held in codes, which vLLM's cache does not do for planish. Use planish.load.")
        acts = [how.scheme.activations for how in self.checkpoint.packed.values()]
        if any(act is not None and act.dynamic and act.granularity == "tensor" for act in acts):
            raise PlanishError(
                f"{model_name}: dynamic activations per tensor depend on what else is in vLLM's batch. Use granularity token, or planish.load."
            )

    @property
    def checkpoint(self) -> StoredCheckpoint:
        """The opened checkpoint."""
        assert self.folder is not None
        return _opened(self.folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Told by vLLM's class of a model, and by those inside it, how they call what the checkpoint has."""
        self.mappers.append(hf_to_vllm_mapper)

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM leaves out what planish reads itself; biases it takes where its layers have them, but for experts'."""
        kind = self.checkpoint.config.model_type
        linears = [name_in_files(kind, name) for name in self.checkpoint.packed if f".{EXPERTS}." not in name]
        blocks = dict.fromkeys(name_in_files(kind, name).partition(".experts.")[0] for name in self.checkpoint.packed if f".{EXPERTS}." in name)
        return WeightsMapper(
            orig_to_new_regex={
                re.compile(r"\.planish\."): None,
                re.compile(rf"^({'|'.join(map(re.escape, linears))})\.(weight|input_)"): None,
                re.compile(rf"^({'|'.join(map(re.escape, blocks))})\.experts\."): None,
            }
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """For linears; an attention layer gets its part of the prefix instead. PlanishError: of fused layers only some are quantized."""
        if isinstance(layer, Attention):
            store_prefix(layer, prefix, self.checkpoint)
            return None
        if isinstance(layer, RoutedExperts):
            path = self._experts(prefix)
            return PlanishExpertsMethod(layer, self.checkpoint, path) if quantized_experts(self.checkpoint, path) else None
        if not isinstance(layer, LinearBase):
            return None
        names = self._linears(prefix)
        quantized = [name in self.checkpoint.packed for name in names]
        if not any(quantized):
            return UnquantizedLinearMethod()
        if not all(quantized):
            raise PlanishError(f"{prefix}: vLLM computes {', '.join(names)} at once, but only some of them are quantized. Quantize all or none.")
        return PlanishLinearMethod(self, prefix, names)

    def _linears(self, prefix: str) -> Sequence[str]:
        """The linears of the checkpoint that one of vLLM's layers is: itself, or several that vLLM computes at once; none of what makes embeddings of
        images. PlanishError: no such layer in the language model."""
        parent, _, child = prefix.rpartition(".")
        names = self._names(len(self.mappers))
        for parts in ([child], self.packed_modules_mapping.get(child, ()), MERGED.get(child, ())):
            found = [names.get(f"{parent}.{part}", "") for part in parts]
            if found and all(found):
                return found
        known = topology(self.checkpoint.config)
        if known.body and not any(prefix.startswith(f"{blocks}.") for blocks in self._in_vllm(f"{known.blocks}.")):
            return ()
        raise PlanishError(f"{prefix}: no layer of the checkpoint. planish serves no speculative models.")

    def _experts(self, prefix: str) -> str:
        """Where the experts are in the checkpoint's model that vLLM has at this path."""
        first = ".0.gate_proj"
        known = self._names(len(self.mappers)).get(prefix + first, "")
        return known.removesuffix(first) or name_in_model(self.checkpoint.config.model_type, prefix)

    @lru_cache(maxsize=2)  # noqa: B019  # there is one for as long as the process lives
    def _names(self, _mappers: int) -> dict[str, str]:
        """The checkpoint's layers by what they may be called in vLLM, which has told of so many mappers."""
        kind = self.checkpoint.config.model_type
        layers = dict.fromkeys([*(name.rpartition(".")[0] for name in self.checkpoint.tensors), *self.checkpoint.packed])
        return {other: name for name in layers for other in (name, *self._in_vllm(f"{name_in_files(kind, name)}."))}

    def _in_vllm(self, start: str) -> set[str]:
        """What the layer, or list of layers, may be called in vLLM whose parameters' names start so."""
        found = {start}
        for mapper in self.mappers:
            found |= {mapper.map_name(one) or one for one in found}
        return {one.removesuffix(".") for one in found}


class PlanishLinearMethod(LinearMethodBase):  # type: ignore[misc, unused-ignore]
    """One layer of vLLM, or this rank's share of it: one linear of the checkpoint, or several that read the same input."""

    def __init__(self, config: PlanishConfig, prefix: str, names: Sequence[str]) -> None:
        self.config, self.prefix, self.names = config, prefix, list(names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        """None: planish reads them itself."""
        self.dtype, self.sizes, self.device = params_dtype, output_partition_sizes, torch.empty(0).device
        put_layer(self.prefix, layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the layer's linears, for the kernels that planish.load would take."""
        parts = [found for _, found in self.config.checkpoint.parts(self.names, self.dtype, self.device)]
        own = own_rows(layer, self.prefix, self.sizes, sum(len(part.weight.codes) for part in parts))
        parts, layer.planish_first = cut(parts, own), first_row(layer, own)
        if layer.skip_bias_add and getattr(layer, "bias", None) is not None:  # whoever gets it back adds it
            parts = [part._replace(bias=None) for part in parts]
        packed = pick_kernels("auto", self.dtype, self.device)
        _say(f"linears of {self.config.folder} run on {'packed kernels' if packed else 'the reference'}, in {self.dtype}")
        layer.planish = nn.ModuleList(_packed(parts) if packed else _reference(parts))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output, with the checkpoint's own bias."""
        return run_linears(whole_input(layer, x), self.prefix, sum(self.sizes))


@lru_cache(maxsize=4)
def _say(what: str) -> None:
    """Once in vLLM's log."""
    init_logger("vllm.planish").info("planish: %s", what)


def _packed(parts: Sequence[Parts]) -> list[nn.Module]:
    """The linears whose outputs side by side are the layer's: one, where one product is all of them."""
    linears = packed_readers(parts)
    return [linears[0].joined.linear] if isinstance(linears[0], Part) else linears


def _reference(parts: Sequence[Parts]) -> list[nn.Module]:
    linears = [QuantizedLinear(*part) for part in parts]
    share_input(linears)
    return list(linears)


@lru_cache(maxsize=4)
def _opened(folder: str) -> StoredCheckpoint:
    return open_stored(folder)
