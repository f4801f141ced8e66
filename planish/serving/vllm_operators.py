"""What torch.compile sees of planish inside vLLM: two operators that it leaves alone, for what happens inside depends on the tokens.

Each finds the layer that it runs by name, as vLLM's own operators do.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]
from vllm.utils.torch_utils import direct_register_custom_op  # pyright: ignore[reportMissingImports]

try:  # a name that torch.compile keeps out of what it compiles, so that all layers share it
    from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name  # pyright: ignore[reportMissingImports]
except ImportError:
    LayerNameType = _encode_layer_name = _resolve_layer_name = str
_LIBRARY = torch.library.Library("planish_vllm", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]


def put_layer(name: str, layer: nn.Module) -> None:
    """Where the operators find it. While vLLM makes its model."""
    get_current_vllm_config().compilation_config.static_forward_context[name] = layer


def run_linears(x: Tensor, name: str, width: int) -> Tensor:
    """The layer's linears (layer.planish), side by side from channel layer.planish_first on, all else 0: (..., width). x: (..., channels)."""
    y: Tensor = torch.ops.planish_vllm.linear(x, _encode_layer_name(name), width)
    return y


def run_experts(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, name: str) -> Tensor:
    """The layer's experts (layer.planish) on the tokens that are theirs: (T, D)."""
    y_TD: Tensor = torch.ops.planish_vllm.experts(x_TD, index_TK, weight_TK, _encode_layer_name(name))
    return y_TD


def _ours(name: LayerNameType) -> Any:  # pyright: ignore[reportInvalidTypeForm]
    return get_forward_context().no_compile_layers[_resolve_layer_name(name)]


def _linear(x: Tensor, layer: LayerNameType, width: int) -> Tensor:  # pyright: ignore[reportInvalidTypeForm]
    ours = _ours(layer)
    parts = [linear(x) for linear in ours.planish]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if y.shape[-1] == width else nn.functional.pad(y, (ours.planish_first, width - ours.planish_first - y.shape[-1]))


def _fake_linear(x: Tensor, layer: LayerNameType, width: int) -> Tensor:  # pyright: ignore[reportInvalidTypeForm]
    return x.new_empty((*x.shape[:-1], width))


def _experts(x: Tensor, index: Tensor, weight: Tensor, layer: LayerNameType) -> Tensor:  # pyright: ignore[reportInvalidTypeForm]
    y: Tensor = _ours(layer).planish(x, index.long(), weight.to(x.dtype))
    return y


def _fake_experts(x: Tensor, index: Tensor, weight: Tensor, layer: LayerNameType) -> Tensor:  # pyright: ignore[reportInvalidTypeForm]
    return torch.empty_like(x)


direct_register_custom_op("linear", _linear, fake_impl=_fake_linear, target_lib=_LIBRARY)
direct_register_custom_op("experts", _experts, fake_impl=_fake_experts, target_lib=_LIBRARY)
