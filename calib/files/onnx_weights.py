"""The weights inside an ONNX export of transformers' Dinov2Model, as a checkpoint: what the demo model dinov2-small is made from.

An export keeps the model's parameter names, but for two kinds: a linear layer's weight is an unnamed, transposed operand of the node
".../MatMul" that bears the layer's name, and the position embeddings are cut into the class token's and the patches'.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config

from ...quant.errors import PlanishError
from .cache import build_once, content_hash

if TYPE_CHECKING:
    from onnx import GraphProto

# What facebook/dinov2-small is published with (BitImageProcessor is the name of the class, not of the data's model).
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
HEAD_DIM = 64  # of all DINOv2 models


def convert_dinov2(path: Path, card: str) -> Path:
    """A float32 checkpoint folder with the encoder under "backbone." in an ONNX file, and its preprocessor_config.json.

    card: text of the folder's README.md. Errors: the package onnx is missing, not an ONNX file, no DINOv2 encoder in it.
    """
    if importlib.util.find_spec("onnx") is None:
        raise PlanishError(f"{path}: reading ONNX files needs the package onnx. Run: pip install onnx")

    def build(folder: Path) -> None:
        tensors = dinov2_tensors(path)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _config(tensors).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")

    return build_once(f"{path.stem}-{content_hash([path])}", build)


def dinov2_tensors(path: Path, prefix: str = "backbone") -> dict[str, Tensor]:
    """The encoder's tensors under the names that Dinov2Model's checkpoints have, in the stored dtype. Errors: as of convert_dinov2."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise PlanishError(f"{path}: not an ONNX file ({error}). Install its package again.") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {name.removeprefix(f"{prefix}."): _tensor(tensor) for name, tensor in stored.items() if name.startswith(f"{prefix}.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(f"/{prefix}/") and node.input[1] in stored:
            layer = node.name.removeprefix(f"/{prefix}/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = _tensor(stored[node.input[1]]).T.contiguous()
    positions = _positions(graph, f"/{prefix}/embeddings/")
    if len(positions) != 2 or "embeddings.cls_token" not in tensors:
        raise PlanishError(f"{path}: no DINOv2 encoder named {prefix} in this ONNX file. Install its package again.")
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return tensors


def _positions(graph: "GraphProto", nodes: str) -> list[Tensor]:
    """The unnamed operands (1, count, channels) of the embedding's nodes, the class token's first."""
    names = {name for node in graph.node if node.name.startswith(nodes) for name in node.input if name.startswith("onnx::")}
    found = [_tensor(tensor) for tensor in graph.initializer if tensor.name in names and len(tensor.dims) == 3]
    return sorted(found, key=lambda tensor: tensor.shape[1])


def _tensor(stored: object) -> Tensor:
    from onnx import TensorProto, numpy_helper

    assert isinstance(stored, TensorProto)
    return torch.from_numpy(numpy_helper.to_array(stored).copy())


def _config(tensors: dict[str, Tensor]) -> Dinov2Config:
    patch = tensors["embeddings.patch_embeddings.projection.weight"]
    hidden, channels, _, size = patch.shape
    config = Dinov2Config(
        hidden_size=hidden,
        num_channels=channels,
        patch_size=size,
        num_attention_heads=hidden // HEAD_DIM,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in tensors),
        mlp_ratio=tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        image_size=size * math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1),
        use_mask_token=False,
        architectures=["Dinov2Model"],
        dtype=str(patch.dtype).removeprefix("torch."),
    )
    return config
