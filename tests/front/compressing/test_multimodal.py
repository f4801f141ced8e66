"""Models that take images: the language model inside is quantized, all else stays as it is, and images are seen as before."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import edit_json, merge, rewrite
from helpers_compress import distance, quick
from tiny_multimodal import CONFIGS_WITH_IMAGES, SEEING, seen, with_images
from torch import Tensor
from transformers import AutoModelForImageTextToText

import planish
from planish.calib.blocks.multimodal import MULTIMODAL
from planish.calib.blocks.topology import topology
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.quant.errors import PlanishError
from planish.quant.transforms.prefix import Prefix
from planish.recipe.schema import Recipe, load_recipe, with_settings

EIGHT = with_settings(quick("w8a8"), ("scheme.activations.symmetric=false",))  # on the same grid in stock transformers
FAST = replace(quick("w4a4-fast"), steps=tuple(step for step in quick("w4a4-fast").steps if not isinstance(step, Prefix)))


MIXTURE = "qwen3_5_moe"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("multimodal")
    return {kind: with_images(kind, root / kind) for kind in CONFIGS_WITH_IMAGES}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def test_every_kind_has_a_case() -> None:
    assert set(CONFIGS_WITH_IMAGES) == set(MULTIMODAL)


@pytest.mark.parametrize("kind", CONFIGS_WITH_IMAGES)
def test_the_language_model_inside_is_quantized(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """planish and stock transformers compute the same of texts; outside the blocks every tensor is what it was."""
    out = tmp_path / "out"
    planish.compress(EIGHT, sources[kind], out)
    found = planish.verify(out, against=sources[kind])
    assert found.ok, [check for check in found.checks if check.ok is False]
    assert {check.name for check in found.checks if check.ok} >= {"structure", "values", "probe", "transformers"}
    base, stored = open_checkpoint(sources[kind]), open_stored(out)
    inside = f"{topology(base.config).body}."
    assert all(name.startswith(inside) for name in stored.packed)
    outside = [name for name in base.tensors if not name.startswith(inside)]
    assert outside
    for name in outside:
        assert torch.equal(base.read([name])[name], stored.read([name])[name]), name


@pytest.mark.parametrize("kind", [kind for kind in SEEING if kind != MIXTURE])
def test_images_are_seen(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """In planish.load, packed kernels too, and in stock transformers; a model that did not see them is far off."""
    planish.compress(EIGHT, sources[kind], tmp_path / "out")
    inputs, load = seen(kind), AutoModelForImageTextToText.from_pretrained
    base = load(sources[kind], dtype=torch.float32)
    expected = logits(base, inputs)
    own = logits(planish.load(tmp_path / "out", dtype=torch.float32, device="cpu"), inputs)
    assert distance(own, expected) < 0.1
    assert distance(logits(load(tmp_path / "out", dtype=torch.float32), inputs), own) < 0.01
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    model = planish.load(tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    assert distance(logits(model, half), own) < 0.06
    assert model.generate(**half, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]  # type: ignore[operator]
    assert distance(logits(base, {"input_ids": inputs["input_ids"]}), expected) > 0.5


def test_a_mixture_inside(sources: dict[str, Path], tmp_path: Path) -> None:
    """Files have a tensor for each expert, or one of all: the same either way. Rounding sends some tokens to other experts, so the bar is low."""
    recipe = with_settings(quick("w4a16-channel"), ("scheme.weights.bits=8",))
    planish.compress(recipe, sources[MIXTURE], tmp_path / "out")
    joined = shutil.copytree(sources[MIXTURE], tmp_path / "joined")
    tensors = merge(joined)
    for block in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        layers = {kind: [tensors.pop(f"{block}.experts.{n}.{kind}_proj.weight") for n in range(4)] for kind in ("gate", "up", "down")}
        pairs = zip(layers["gate"], layers["up"], strict=True)
        tensors |= {f"{block}.experts.gate_up_proj": torch.stack([torch.cat(pair) for pair in pairs])}
        tensors |= {f"{block}.experts.down_proj": torch.stack(layers["down"])}
    rewrite(joined, tensors)
    planish.compress(recipe, joined, tmp_path / "same")
    assert_same(tmp_path / "out", tmp_path / "same")
    load, inputs = AutoModelForImageTextToText.from_pretrained, seen(MIXTURE)
    own = logits(planish.load(tmp_path / "out", dtype=torch.float32, device="cpu"), inputs)
    assert distance(logits(load(tmp_path / "out", dtype=torch.float32), inputs), own) < 0.03
    base = load(sources[MIXTURE], dtype=torch.float32)
    assert distance(own, logits(base, inputs)) < 0.4 < 0.8 < distance(logits(base, {"input_ids": inputs["input_ids"]}), logits(base, inputs))


def assert_same(one: Path, other: Path) -> None:
    tensors = merge(one)
    for name, tensor in merge(other).items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors


def test_what_is_beside_keeps_its_names(tmp_path: Path) -> None:
    """Servers know it by those of the original files, which may be older than transformers'; so the config means it by patterns."""
    base, out = with_images("llava", tmp_path / "base"), tmp_path / "out"
    rewrite(base, {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in merge(base).items()})
    planish.compress(EIGHT, base, out)
    outside = {name for name in merge(base) if "language_model" not in name}
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in outside)
    assert outside < merge(out).keys()
    assert planish.verify(out, against=base).ok
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(re.match(pattern.removeprefix("re:"), "vision_tower.vision_model.encoder.layers.0.mlp.fc1") for pattern in ignored)
    expected = logits(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), seen("llava"))
    assert distance(logits(planish.load(out, dtype=torch.float32, device="cpu"), seen("llava")), expected) < 0.1


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", MIXTURE])
def test_steps_at_run_time(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """planish.load and from_pretrained run them alike, with images."""
    planish.compress(FAST, sources[kind], tmp_path / "out")
    loaded = planish.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    others = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, seen(kind)), logits(others, seen(kind)), rtol=0, atol=0)


def test_untied_and_folded(sources: dict[str, Path], tmp_path: Path) -> None:
    """The head gets weights of its own, and both configurations say so."""
    recipe = with_settings(replace(quick("w8a8"), steps=()), ("steps=[fold_norms, untie]",))
    planish.compress(recipe, sources["gemma3"], tmp_path / "out")
    assert planish.verify(tmp_path / "out", against=sources["gemma3"]).ok
    assert "lm_head.weight" in merge(tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["mistral3", "llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_images_enter_a_rotated_stream_rotated(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = with_settings(replace(EIGHT, steps=()), ("steps=[fold_norms, {rotate: {at: residual}}]",))
    planish.compress(recipe, sources[kind], tmp_path / "out")
    expected = logits(AutoModelForImageTextToText.from_pretrained(sources[kind], dtype=torch.float32), seen(kind))
    assert distance(logits(planish.load(tmp_path / "out", dtype=torch.float32, device="cpu"), seen(kind)), expected) < 0.1


REFUSED: dict[str, tuple[Recipe, str]] = {
    "prefix": (quick("w4a4-fast"), "steps: prefix: a gemma3 model counts positions by the images before a text"),
    "rotation": (load_recipe("w4a16-best"), "rotate at residual: embeddings of images enter the stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_images_do_not_allow(case: str, sources: dict[str, Path]) -> None:
    recipe, words = REFUSED[case]
    with pytest.raises(PlanishError, match=words):
        planish.plan(recipe, sources["gemma3"])


def test_what_is_around_an_unknown_language_model_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = with_images("llava", tmp_path / "model")
    edit_json(folder / "config.json", text_config={"model_type": "cohere", "hidden_size": 64})
    with pytest.raises(PlanishError, match="multimodal model around a cohere"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", model_type="paligemma", text_config={"model_type": "gemma"})
    with pytest.raises(PlanishError, match="multimodal model around a gemma"):
        open_checkpoint(folder)
