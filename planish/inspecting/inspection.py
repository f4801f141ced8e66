"""Inspecting a model: what its outliers are, what they are worth, and which sites they make hard to quantize."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.proof import check_structure
from ..calib.blocks.topology import topology
from ..calib.compressed.stored import open_any
from ..calib.data.images import GENERATED, feature_change, token_labels
from ..calib.data.images import images as read_images
from ..calib.data.windows import Calibration, start_token
from ..calib.files.checkpoint import Checkpoint
from ..calib.machine.device import free_bytes, pick_device
from ..calib.machine.heap import separate_large
from ..calib.machine.precision import working_dtype
from ..calib.outliers.diagnosis import OutlierReport, Thresholds
from ..calib.outliers.inspection import Subject, inspect_model
from ..calib.walk.runner import BlockRunner
from ..calib.walk.stream import Stream
from ..common.outfile import check_writable
from ..compressing.reporting import peak_bytes
from ..eval.scores.score import hidden_scores
from ..eval.verifying.verify import evaluation_windows
from ..planning.preflight import AVAILABLE_SHARE
from ..quant.errors import PlanishError
from .findings import findings
from .recommend import check_bits, recommend

LENGTH = 512  # tokens of a window
HELD_OUT = 8  # windows or images that tell what a change is worth

Report = Callable[[str, int, int], None]


def inspect(
    model: str | Path,
    *,
    source: str | None = None,
    images: str | None = None,
    samples: int = 32,
    length: int | None = None,
    seed: int | None = 0,
    thresholds: Thresholds | None = None,
    bits: str = "w8a8",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Report | None = None,
) -> OutlierReport:
    """Find a model's outliers: one walk, one block in memory at a time.

    model: anything that compress takes, a checkpoint that it wrote, or a vision transformer. source: of a language model's text: builtin (default), a
    .txt, .jsonl or .parquet file, or hub:NAME. images: of a vision model: generated (default), or a folder of pictures. samples windows of length
    tokens (default: 512; at most what the model takes), or images, drawn with seed. thresholds: the criteria. bits: of the recommended recipe.
    dtype: of the walk (default: bfloat16 where model and hardware have it, else float32). offload_dir: keep the activations on disk there (default:
    in memory where they fit). progress: called with a stage's name, steps done and steps in all. Raises PlanishError.
    """
    start = time.monotonic()
    check_bits(bits)
    calibration = _asked(source, samples, LENGTH if length is None else length, seed)
    if offload_dir is not None:
        check_writable(Path(offload_dir) / "streams")
    checkpoint = open_any(model, allow_pickle=allow_pickle)
    where = pick_device(device)
    working = dtype or working_dtype(checkpoint.dtype, where)
    _check_blocks(checkpoint, working, where)
    vision = topology(checkpoint.config).vision
    if (source if vision else images) is not None:
        kind, wrong, right = ("vision", "source (--text)", "images") if vision else ("language", "images", "source (--text)")
        raise PlanishError(f"{model}: a {kind} model, so {wrong} is of no use. Leave it out, or give {right}.")
    if vision and length is not None:
        raise PlanishError(f"{model}: a vision model, whose images have the length that they have, so length is of no use. Leave it out.")
    subject = _images(checkpoint, images or GENERATED, calibration) if vision else _text(checkpoint, calibration)
    with _stream_folder(_stream_bytes(checkpoint, subject, working), where, offload_dir) as folder:
        report = inspect_model(
            checkpoint,
            subject,
            name=str(model),
            quality=_feature_changes if vision else _perplexities,
            unit="feature change" if vision else "perplexity",
            thresholds=thresholds or Thresholds(),
            dtype=working,
            device=where,
            folder=folder,
            report=progress,
        )
    report = replace(report, findings=findings(report), recommendation=recommend(report, bits))
    return replace(report, seconds=time.monotonic() - start, peak_bytes=peak_bytes())


def _asked(source: str | None, samples: int, length: int, seed: int | None) -> Calibration:
    """The text, or how many images. Raises PlanishError."""
    try:
        return Calibration(source=source or "builtin", samples=samples, length=length, seed=seed)
    except PlanishError as error:
        raise _as_inspected(error) from error


def _as_inspected(error: PlanishError) -> PlanishError:
    """The error in the words of an inspection, which has no recipe: samples, length and seed are its own settings, and its source is --text."""
    text = str(error).replace(", calibration.samples asks", ", samples asks").replace("Lower samples or length", "Lower --samples or --length")
    return PlanishError(
        f"--text{text.removeprefix('calibration.source')}" if text.startswith("calibration.source ") else text.removeprefix("calibration.")
    )


def _check_blocks(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    runner = BlockRunner(checkpoint, dtype, device)
    for index, block in enumerate(runner.blocks):
        check_structure(block, runner.topology.block(index), runner.block_name(index))


def _text(checkpoint: Checkpoint, calibration: Calibration) -> Subject:
    """Windows of the source, and others of the built-in text's other half."""
    tokenizer = checkpoint.tokenizer()
    most = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", calibration.length)
    calibration = replace(calibration, length=min(calibration.length, most))
    try:
        ids_NL = calibration.tokens(tokenizer)
    except PlanishError as error:
        raise _as_inspected(error) from error
    return Subject(
        samples=ids_NL,
        held_out=evaluation_windows(checkpoint, "builtin", HELD_OUT, calibration.length),
        ids_NL=ids_NL,
        text=lambda token: str(tokenizer.decode([token])),
        start=start_token(tokenizer),
        source="builtin, calibration half" if calibration.source == "builtin" else calibration.source,
    )


def _images(checkpoint: Checkpoint, source: str, calibration: Calibration) -> Subject:
    """Images of the source. Generated ones can be held out; of a folder's, the last are looked at twice."""
    more = HELD_OUT if source == GENERATED else 0
    pixels = read_images(source, checkpoint, calibration.samples + more, calibration.seed)
    labels = token_labels(checkpoint, (pixels.shape[2], pixels.shape[3]))
    return Subject(
        samples=pixels[: calibration.samples],
        held_out=pixels[-HELD_OUT:],
        ids_NL=torch.arange(len(labels)).expand(calibration.samples, -1),
        text=lambda position: labels[position],
        start=None,
        source="generated images" if source == GENERATED else f"images of {source}",
    )


def _perplexities(runner: BlockRunner, batches: Sequence[Tensor], streams: Sequence[Stream]) -> list[float]:
    return [score.perplexity for score in hidden_scores(runner, batches, streams)]


def _feature_changes(runner: BlockRunner, _batches: Sequence[Tensor], streams: Sequence[Stream]) -> list[float]:
    """How far the features are from those of the unchanged model, the first stream."""
    with runner.features() as features:
        reference = torch.cat([features(hidden) for hidden in streams[0]])
        return [feature_change(torch.cat([features(hidden) for hidden in stream]), reference) for stream in streams]


def _stream_bytes(checkpoint: Checkpoint, subject: Subject, dtype: torch.dtype) -> int:
    """All hidden states between two blocks: of the unchanged model and of its four variants."""
    tokens = subject.ids_NL.numel() + 4 * len(subject.held_out) * subject.ids_NL.shape[1]
    return int(tokens * checkpoint.config.get_text_config().hidden_size * dtype.itemsize)


@contextmanager
def _stream_folder(size: int, device: torch.device, offload_dir: str | Path | None) -> Iterator[Path | None]:
    """Where the streams lie: None, in memory, where they fit into what is free; else a folder that is gone afterwards."""
    if offload_dir is None and size <= AVAILABLE_SHARE * free_bytes(device):
        yield None
        return
    separate_large()
    if offload_dir is not None:
        Path(offload_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="planish-inspect-", dir=offload_dir) as folder:
        yield Path(folder)
