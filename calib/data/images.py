"""Images for vision models: pictures from a folder or generated ones, as the model's own preprocessing hands them over.

Preprocessing is that of the checkpoint's preprocessor_config.json, done by transformers' image processor on Pillow (torchvision is not needed).

Generated images have what the statistics of natural ones are known for: noise whose amplitude falls as 1 / frequency (Field 1987, "Relations between
the statistics of natural images and the response properties of cortical cells"), and shapes of all sizes that hide each other ("dead leaves": Lee,
Mumford and Huang 2001, "Occlusion models for natural images"), over a smooth gradient. They show nothing that a classifier knows.

Shape suffixes: C the three colours, H and W height and width, B images, L tokens, D channels.
"""

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from ...quant.errors import PlanishError
from ..blocks.topology import topology
from ..files.checkpoint import Checkpoint
from ..files.convert import REJECTED

if TYPE_CHECKING:
    from PIL.Image import Image

GENERATED = "generated"
PREPROCESSOR_FILE = "preprocessor_config.json"
SHAPES = (6, 18)  # fewest and most of them in a generated image
NOISE = 0.12  # standard deviation of the noise, of colours from 0 to 1


def images(source: str | Path, checkpoint: Checkpoint, samples: int, seed: int | None = 0) -> Tensor:
    """What the model is shown: (samples, 3, H, W) float32, preprocessed.

    source: "generated", or a folder of pictures (any format that Pillow knows; sub-folders are not looked at). seed: generated images depend on it
    and on their place alone; pictures are drawn without replacement, in the order of their names; None: the first ones, or seed 0's generated ones.
    Errors: Pillow is missing; no such folder, no or too few pictures in it, or one that cannot be read; preprocessor_config.json is missing, cannot
    be used, or leaves pictures of different sizes; the model takes other than 3 colour channels.
    """
    if samples < 1:
        raise PlanishError(f"samples is {samples}, but must be at least 1.")
    _check_pillow()
    if (channels := checkpoint.config.num_channels) != 3:
        raise PlanishError(f"{checkpoint.path}: takes images of {channels} channels; planish has images of 3 (red, green, blue).")
    processor = _processor(checkpoint.path)
    pictures = _generated(processor, samples, seed or 0) if source == GENERATED else _read(Path(source).expanduser(), samples, seed)
    try:
        pixels = [processor(images=picture, return_tensors="pt").pixel_values for picture in pictures]
    except REJECTED as error:
        raise PlanishError(f"{checkpoint.path / PREPROCESSOR_FILE}: these settings do not work on images: {error}") from error
    shapes = {tuple(pixel.shape[-2:]) for pixel in pixels}
    if len(shapes) > 1:
        sizes = ", ".join(f"{h} x {w}" for h, w in sorted(shapes)[:3])
        raise PlanishError(f"{source}: after {PREPROCESSOR_FILE}, images differ in size ({sizes}). Give pictures of one shape, or a crop_size there.")
    return torch.cat(pixels).float()


def token_labels(checkpoint: Checkpoint, size: tuple[int, int]) -> tuple[str, ...]:
    """A name for each token of an image of size (H, W): class, register 1, ..., then the patches as "patch row,column" from 0."""
    patch = checkpoint.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    lead = ("class", *(f"register {i}" for i in range(1, topology(checkpoint.config).lead)))
    return (*lead, *(f"patch {row},{column}" for row in range(size[0] // height) for column in range(size[1] // width)))


def feature_change(changed_BLD: Tensor, reference_BLD: Tensor) -> float:
    """||changed - reference|| / ||reference|| over all features, Euclidean norms in float32."""
    reference = reference_BLD.float()
    return float((changed_BLD.float() - reference).norm() / reference.norm())


def synthetic(side: int, generator: torch.Generator) -> Tensor:
    """One generated image: (3, side, side) in [0, 1]."""
    y_H1, x_1W = torch.linspace(-1, 1, side)[:, None], torch.linspace(-1, 1, side)[None, :]
    slope_y, slope_x = torch.randn(2, generator=generator).tolist()
    ramp_HW = torch.sigmoid(slope_y * y_H1 + slope_x * x_1W)
    ends_2C11 = torch.rand(2, 3, 1, 1, generator=generator)
    image_CHW = ends_2C11[0] * ramp_HW + ends_2C11[1] * (1 - ramp_HW)
    for _ in range(int(torch.randint(SHAPES[0], SHAPES[1] + 1, (1,), generator=generator))):
        image_CHW = torch.where(_shape(y_H1, x_1W, generator), torch.rand(3, 1, 1, generator=generator), image_CHW)
    grey_HW, *colour_CHW = [_noise(side, generator) for _ in range(4)]
    return (image_CHW + NOISE * (grey_HW + 0.3 * torch.stack(colour_CHW))).clamp(0, 1)


def _shape(y_H1: Tensor, x_1W: Tensor, generator: torch.Generator) -> Tensor:
    """The pixels of a turned ellipse or rectangle, (H, W) bool; its size has a density of about 1 / size^3, as in natural images."""
    top, left, height, width, turn, kind = torch.rand(6, generator=generator).tolist()
    radius_y, radius_x = (0.1 / math.sqrt(1 - 0.97 * length) for length in (height, width))
    cos, sin = math.cos(turn * math.pi), math.sin(turn * math.pi)
    y_H1, x_1W = y_H1 - (2 * top - 1), x_1W - (2 * left - 1)
    along_HW, across_HW = (cos * x_1W + sin * y_H1).abs() / radius_x, (cos * y_H1 - sin * x_1W).abs() / radius_y
    size_HW = torch.hypot(along_HW, across_HW) if kind < 0.5 else torch.maximum(along_HW, across_HW)
    return size_HW.lt(1)


def _noise(side: int, generator: torch.Generator) -> Tensor:
    """Noise with an amplitude of 1 / frequency: (side, side), standard deviation 1."""
    frequency = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None] ** 2).sqrt()
    spectrum = torch.fft.rfft2(torch.randn(side, side, generator=generator)) / frequency.clamp(min=1 / side)
    noise: Tensor = torch.fft.irfft2(spectrum, s=(side, side))
    return (noise - noise.mean()) / noise.std()


def _check_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise PlanishError("images need the package Pillow. Run: pip install 'planish[vision]'") from error


def _processor(folder: Path) -> Any:
    path = folder / PREPROCESSOR_FILE
    if not path.is_file():
        raise PlanishError(f"{path}: no such file, and it says how the model's images are prepared. Copy it from where the model was published.")
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder), backend="pil", local_files_only=True, trust_remote_code=False
        )
    except REJECTED as error:
        raise PlanishError(f"{path}: transformers makes no image processor of it: {error}") from error


def _generated(processor: Any, samples: int, seed: int) -> "list[Image]":
    from PIL import Image

    side = max(length for length in dict(processor.size).values() if length)
    generator = torch.Generator().manual_seed(seed)
    arrays = [(synthetic(side, generator) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for _ in range(samples)]
    return [Image.fromarray(array) for array in arrays]


def _read(folder: Path, samples: int, seed: int | None) -> "list[Image]":
    """`samples` pictures of the folder in RGB, turned as their EXIF data says."""
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise PlanishError(f"{folder}: no such folder. Images come from a folder of pictures, or are {GENERATED}.")
    known = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in known)
    if len(files) < samples:
        held = f"{len(files)} pictures" if files else "no picture (.png, .jpg or any other format that Pillow knows)"
        raise PlanishError(f"{folder}: holds {held}, and samples asks for {samples}. Lower samples, or add pictures.")
    chosen = range(samples) if seed is None else sorted(random.Random(seed).sample(range(len(files)), samples))
    pictures = []
    for file in (files[i] for i in chosen):
        try:
            with Image.open(file) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise PlanishError(f"{file}: not a readable image ({error}). Remove it from the folder, or replace it.") from error
    return pictures
