"""Images for vision models: from a folder, generated, through the model's own preprocessing, and every way in which that fails."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import edit_json
from helpers_stored import saved
from tiny_models import tiny_vision

from planish.calib.data.images import GENERATED, feature_change, images, synthetic, token_labels
from planish.calib.files.checkpoint import Checkpoint, open_checkpoint
from planish.calib.files.onnx_weights import PREPROCESSOR
from planish.quant.errors import PlanishError

Image = pytest.importorskip("PIL.Image")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 20}, "image_mean": MEAN, "image_std": STD, "resample": 2}


def model(folder: Path, preprocessor: dict[str, Any] | None = None, family: str = "vit") -> Checkpoint:
    saved(tiny_vision(family), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor or VIT))
    return open_checkpoint(folder)


def picture(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (40, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(path)


def normalised(colour: tuple[int, int, int]) -> torch.Tensor:
    return (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    checkpoint, folder = model(tmp_path / "model"), tmp_path / "pictures"
    picture(folder / "b.png", (255, 0, 51))
    picture(folder / "a.JPG", (0, 0, 0), size=(7, 90))
    picture(folder / "c.png", (102,), mode="L")
    picture(folder / "d.png", (255, 255, 0, 128), mode="RGBA")
    (folder / "notes.txt").write_text("not a picture, and not taken for one")
    found = images(folder, checkpoint, 4, seed=None)
    assert found.shape == (4, 3, 16, 20)
    assert found.dtype is torch.float32
    for one, colour in zip(found, ((0, 0, 0), (255, 0, 51), (102, 102, 102), (255, 255, 0)), strict=True):
        torch.testing.assert_close(one, normalised(colour)[:, None, None].expand(3, 16, 20), atol=1e-5, rtol=1e-5)


def test_the_seed_draws_pictures_without_replacement(tmp_path: Path) -> None:
    checkpoint, folder = model(tmp_path / "model"), tmp_path / "pictures"
    for i in range(9):
        picture(folder / f"{i}.png", (20 * i, 0, 0))

    def order(samples: int, seed: int | None) -> list[float]:
        return [round(float(one), 3) for one in images(folder, checkpoint, samples, seed)[:, 0, 0, 0]]

    assert order(9, 3) == order(9, None) == sorted(order(9, None))
    drawn = {seed: order(4, seed) for seed in range(5)}
    assert all(len(set(chosen)) == 4 and chosen == sorted(chosen) for chosen in drawn.values())
    assert len({tuple(chosen) for chosen in drawn.values()}) > 1
    assert drawn[2] == order(4, 2)


def test_resize_and_crop_as_the_file_says(tmp_path: Path) -> None:
    preprocessor = {
        **PREPROCESSOR,
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 12, "width": 16},
        "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
    }
    checkpoint, folder = model(tmp_path / "model", preprocessor, "dinov2"), tmp_path / "pictures"
    folder.mkdir()
    wide = Image.new("RGB", (80, 40), (0, 0, 0))
    wide.paste((255, 255, 255), (30, 0, 50, 40))
    wide.save(folder / "wide.png")
    (found,) = images(folder, checkpoint, 1)
    assert found.shape == (3, 12, 16)
    assert found[0, 6, 8] > 0.9
    assert found[0, 6, 0] < 0.1
    assert int((found[0, 6] > 0.5).sum()) == 10


def test_generated_images(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "model")
    found = images(GENERATED, checkpoint, 3, seed=5)
    assert found.shape == (3, 3, 16, 20)
    assert torch.equal(found[:2], images(GENERATED, checkpoint, 2, seed=5))
    assert not torch.equal(found, images(GENERATED, checkpoint, 3, seed=6))
    assert torch.equal(images(GENERATED, checkpoint, 1, seed=None), images(GENERATED, checkpoint, 1, seed=0))
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 0.1


def test_generated_images_have_the_spectrum_of_natural_ones() -> None:
    """Amplitude falls as about 1 / frequency (natural images: slopes of 0.8 to 1.5), and all images are different."""
    generator = torch.Generator().manual_seed(0)
    made = [synthetic(128, generator) for _ in range(16)]
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 and float(one.std()) > 0.05 for one in made)
    window = torch.hann_window(128)[:, None] * torch.hann_window(128)[None]
    power = sum(torch.fft.fft2((one.mean(0) - one.mean()) * window).abs() ** 2 for one in made)
    assert isinstance(power, torch.Tensor)
    frequency = (torch.fft.fftfreq(128)[:, None] ** 2 + torch.fft.fftfreq(128)[None] ** 2).sqrt()
    rings = [power[(frequency >= low) & (frequency < 1.25 * low)].mean().sqrt() for low in (0.04, 0.32)]
    slope = float(torch.log(rings[0] / rings[1])) / torch.log(torch.tensor(8.0))
    assert 0.8 < slope < 1.5


def test_token_labels(tmp_path: Path) -> None:
    assert token_labels(model(tmp_path / "one"), (8, 12)) == ("class", *(f"patch {i},{j}" for i in range(2) for j in range(3)))
    with_registers = token_labels(model(tmp_path / "two", family="dinov2_with_registers"), (16, 16))
    assert with_registers[:5] == ("class", "register 1", "register 2", "register 3", "patch 0,0")
    assert len(with_registers) == 20


def test_feature_change() -> None:
    reference = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert feature_change(reference, reference) == 0
    assert feature_change(reference * 1.5, reference) == 0.5
    assert feature_change(reference.bfloat16() + torch.tensor([[[0.0, 5.0], [0.0, 0.0]]]), reference) == 1


Break = Callable[[Path, Path], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "no folder": (lambda model, folder: folder.rename(folder.with_name("elsewhere")), r"pictures: no such folder"),
    "empty": (lambda model, folder: (folder / "a.png").unlink(), r"pictures: holds no picture \(\.png"),
    "one only": (lambda model, folder: (folder / "b.txt").write_text(""), r"pictures: holds 1 pictures, and samples asks for 2"),
    "not an image": (lambda model, folder: (folder / "b.png").write_text("no"), r"b\.png: not a readable image"),
    "truncated": (lambda model, folder: (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60]), r"b\.png: not a readable image"),
    "no preprocessor": (lambda model, folder: (model / "preprocessor_config.json").unlink(), r"preprocessor_config\.json: no such file"),
    "broken preprocessor": (lambda model, folder: (model / "preprocessor_config.json").write_text("{"), r"transformers makes no image processor"),
    "unknown preprocessor": (
        lambda model, folder: (model / "preprocessor_config.json").write_text('{"image_processor_type": "Sorcery"}'),
        r"transformers makes no image processor",
    ),
    "impossible settings": (
        lambda model, folder: (picture(folder / "b.png", (0, 0, 0)), edit_json(model / "preprocessor_config.json", image_mean=[1, 2])),
        r"these settings do not work on images",
    ),
    "one size each": (
        lambda model, folder: (
            picture(folder / "b.png", (0, 0, 0), size=(32, 90)),
            (model / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "do_center_crop": False})),
        ),
        r"images differ in size \(256 x 320, 720 x 256\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used(tmp_path: Path, case: str) -> None:
    checkpoint, folder = model(tmp_path / "model"), tmp_path / "pictures"
    picture(folder / "a.png", (9, 9, 9))
    damage, message = BROKEN[case]
    damage(tmp_path / "model", folder)
    with pytest.raises(PlanishError, match=message):
        images(folder, checkpoint, 2)


def test_other_channels_and_counts(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "model")
    with pytest.raises(PlanishError, match="samples is 0, but must be at least 1"):
        images(GENERATED, checkpoint, 0)
    checkpoint.config.num_channels = 4
    with pytest.raises(PlanishError, match="takes images of 4 channels"):
        images(GENERATED, checkpoint, 1)


def test_pillow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(PlanishError, match=r"Pillow. Run: pip install 'planish\[vision\]'"):
        images(GENERATED, checkpoint, 1)
