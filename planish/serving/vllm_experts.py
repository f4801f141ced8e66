"""A mixture's experts inside vLLM, as planish.load runs them: each is a gated MLP of layers of planish, given the tokens that the router sends it.

One expert runs after the other, and which ones do depends on the tokens: right everywhere, made for CPUs, and nothing that a CUDA graph could hold.
With tensor parallelism a rank has every so manieth expert whole, and vLLM's sum over the ranks is that over all experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase  # pyright: ignore[reportMissingImports]

from ..calib.blocks.experts import Expert, Experts
from ..calib.compressed.packed import fuse_experts, packed_readers, pick_kernels
from ..calib.compressed.stored import StoredCheckpoint
from ..quant.errors import PlanishError
from ..quant.linear import QuantizedLinear, share_input
from .vllm_operators import put_layer, run_experts

LAYERS = ("gate_proj", "up_proj", "down_proj")


def quantized_experts(checkpoint: StoredCheckpoint, path: str) -> bool:
    """Whether the experts at this path of the model are planish's. PlanishError: some of them are, or they cannot be run here."""
    ours = [name in checkpoint.packed for name in checkpoint.linears if name.startswith(f"{path}.")]
    if not any(ours):
        return False
    if not all(ours):
        raise PlanishError(f"{path}: vLLM computes all experts at once, but only some of their layers are quantized. Quantize all or none.")
    config = get_current_vllm_config()
    if config.parallel_config.enable_expert_parallel or config.parallel_config.data_parallel_size != 1:
        raise PlanishError(
            "expert and data parallelism: planish's experts know the tensor kind only. Leave --enable-expert-parallel and --data-parallel-size out."
        )
    if torch.empty(0).is_cuda and not config.model_config.enforce_eager:
        raise PlanishError("CUDA graphs: which of planish's experts run depends on the tokens, and a graph holds them. Give --enforce-eager.")
    return True


class Elsewhere(nn.Module):
    """An expert that another rank has."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """Zeros, (T, D)."""
        return torch.zeros_like(x_TD)


class PlanishExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc, unused-ignore]
    """The experts of one block."""

    def __init__(self, layer: nn.Module, checkpoint: StoredCheckpoint, path: str) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint, self.path, self.name = checkpoint, path, f"{path}.planish"

    def create_weights(self, layer: nn.Module, num_experts: int, *_sizes: Any, params_dtype: torch.dtype, **_attributes: Any) -> None:
        """None: planish reads them itself."""
        self.count, self.dtype, self.device = num_experts, params_dtype, torch.empty(0).device
        put_layer(self.name, layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the experts, for the kernels that planish.load would take."""
        packed = pick_kernels("auto", self.dtype, self.device)
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        experts = Experts(self._expert(number, packed) if number % ranks == rank else Elsewhere() for number in range(self.count))
        if packed:
            fuse_experts(experts, self.dtype, self.device)
        layer.planish = experts

    def _expert(self, number: int, packed: bool) -> Expert:
        names = [f"{self.path}.{number}.{layer}" for layer in LAYERS]
        parts = [found for _, found in self.checkpoint.parts(names, self.dtype, self.device)]
        act = ACT2FN[self.checkpoint.config.get_text_config().hidden_act]
        if packed:
            both, last = packed_readers(parts[:2]), packed_readers(parts[2:])
            return Expert(both[0], both[1], last[0], act)
        gate, up, down = (QuantizedLinear(*part) for part in parts)
        share_input([gate, up])
        return Expert(gate, up, down, act)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: vLLM's kernels do not run."""

    def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_shared: Any, **_more: Any) -> Tensor:
        """What the experts make of the tokens x (T, D), without what vLLM's shared experts do."""
        return run_experts(x, topk_ids, topk_weights, self.name)
