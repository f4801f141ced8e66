"""The walk of an inspection says what a plain forward pass of the whole model says, and what it plants it finds."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers_stored import rounded, saved
from tiny_models import CONFIGS, RELATIVES, VISION, pixels, tiny, tiny_vision, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.calib.blocks.topology import topology
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import Checkpoint, open_checkpoint
from planish.calib.outliers.diagnosis import SCHEMES, TRANSFORMS, Intervention, OutlierReport, Thresholds
from planish.calib.outliers.inspection import Subject, inspect_model
from planish.calib.outliers.interventions import AVERAGED, UNCHANGED, ZEROED
from planish.calib.walk.runner import BlockRunner
from planish.calib.walk.stream import Stream
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat

SAMPLES, LENGTH, PLANTED = 6, 24, 2  # token 2 is not among the random ones


def subject(ids: Tensor, held_out: Tensor) -> Subject:
    return Subject(samples=ids, held_out=held_out, ids_NL=ids, text=lambda token: f"<{token}>", start=1, source="random")


def likelihood(runner: BlockRunner, batches: Sequence[Tensor], streams: Sequence[Stream]) -> list[float]:
    """Perplexity, by hand."""
    found = []
    with runner.head() as head:
        for stream in streams:
            losses = [
                _nll(torch.cat(list(head.logits(h))), ids)
                for b, hidden in zip(batches, stream, strict=True)
                for ids, h in zip(b, hidden, strict=True)
            ]
            found.append(math.exp(sum(losses) / len(losses)))
    return found


def _nll(logits_LV: Tensor, ids_L: Tensor) -> float:
    return nn.functional.cross_entropy(logits_LV[:-1], ids_L[1:]).item()


def inspected(checkpoint: Checkpoint, about: Subject, folder: Path | None = None, thresholds: Thresholds | None = None) -> OutlierReport:
    return inspect_model(
        checkpoint,
        about,
        name="tiny",
        quality=likelihood,
        unit="perplexity",
        thresholds=thresholds or Thresholds(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        folder=folder,
    )


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    losses = [_nll(logits, one) for logits, one in zip(model(ids).logits, ids, strict=True)]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_every_family_is_seen_as_it_is(family: str, tmp_path: Path) -> None:
    model, ids, held = tiny(family), tokens(SAMPLES, LENGTH), tokens(3, LENGTH, seed=5)
    found = inspected(open_checkpoint(saved(model, tmp_path / "model")), subject(ids, held))
    plan = topology(model.config)
    assert (found.blocks, found.hidden, found.samples, found.length, found.compressed) == (plan.block_count, 64, SAMPLES, LENGTH, False)
    hidden = _outputs(model, plan.blocks, ids)
    assert [record.layer for record in found.magnitudes] == list(range(-1, plan.block_count))
    for record, h in zip(found.magnitudes[1:], hidden, strict=True):
        assert record.top == pytest.approx(h.abs().flatten(1).topk(3).values.mean(0).tolist(), rel=1e-4)
    assert found.interventions == (Intervention(name=UNCHANGED, layer=None, quality=pytest.approx(perplexity(model, held), rel=1e-4)),)
    assert (found.massive, found.super_weights, found.outlier_tokens, found.prefix) == ((), (), (), None)
    assert [site.name for site in found.sites] == [f"{block}.{site.name}" for block in range(plan.block_count) for site in plan.block(block).sites]
    for site in found.sites:
        assert site.sink_tokens == 0
        assert site.every.absmax >= site.ordinary.absmax > 0
        assert {scheme: tuple(by) for scheme, by in site.errors.items()} == dict.fromkeys(SCHEMES, TRANSFORMS)
    assert (None if found.attention is None else len(found.attention.score)) == (None if plan.without_attention else plan.block_count)
    assert len(found.landscapes) == plan.block_count + 1


def _outputs(model: PreTrainedModel, blocks: str, ids: Tensor) -> list[Tensor]:
    """What every block gives out."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for block in model.get_submodule(blocks).children()
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def planted(tmp_path: Path) -> tuple[PreTrainedModel, Checkpoint, Subject]:
    """A Llama in which token 2 carries 5,000 in channel 9, at another position in every sample."""
    model, ids, held = tiny("llama", changes={"tie_word_embeddings": False}), tokens(SAMPLES, LENGTH), tokens(3, LENGTH, seed=5)
    model.get_input_embeddings().weight.data[PLANTED, 9] = 5000
    for rows in (ids, held):
        rows[torch.arange(len(rows)), torch.arange(len(rows)) * 3] = PLANTED
    return model, open_checkpoint(saved(model, tmp_path / "model")), subject(ids, held)


@torch.no_grad()
def test_a_planted_massive_activation(planted: tuple[PreTrainedModel, Checkpoint, Subject]) -> None:
    model, checkpoint, about = planted
    found = inspected(checkpoint, about)
    first, *_ = found.massive
    assert (first.channel, first.position, first.token, first.born, first.died) == (9, None, f"<{PLANTED}>", -1, None)
    assert first.massive
    assert first.constant
    assert first.value == pytest.approx(5000, rel=0.01)
    assert all(site.sink_tokens == SAMPLES for site in found.sites)
    quality = {one.name: one.quality for one in found.interventions}
    assert list(quality) == [UNCHANGED, ZEROED, AVERAGED]
    assert quality[AVERAGED] == pytest.approx(quality[UNCHANGED], rel=1e-4)
    model.get_input_embeddings().weight[PLANTED, 9] = 0
    assert quality[ZEROED] == pytest.approx(perplexity(model, about.held_out), rel=1e-4)


def test_streams_on_disk_change_nothing(planted: tuple[PreTrainedModel, Checkpoint, Subject], tmp_path: Path) -> None:
    _, checkpoint, about = planted
    assert inspected(checkpoint, about, tmp_path / "streams") == inspected(checkpoint, about)
    assert any((tmp_path / "streams").rglob("*.safetensors"))


@torch.no_grad()
def test_a_planted_super_weight(tmp_path: Path) -> None:
    model, ids, held = tiny("llama", changes={"tie_word_embeddings": False}), tokens(SAMPLES, LENGTH), tokens(3, LENGTH, seed=5)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[17, 40] = 500 * weight.abs().max()
    found = inspected(open_checkpoint(saved(model, tmp_path / "model")), subject(ids, held))
    (only,) = found.super_weights
    assert (only.module, only.layer, only.row, only.column) == ("model.layers.1.mlp.down_proj", 1, 17, 40)
    assert only.value == weight[17, 40].item()
    assert only.published is None
    weight[17, 40] = 0
    assert only.quality == pytest.approx(perplexity(model, held), rel=1e-4)
    assert found.interventions[1] == Intervention(name="model.layers.1.mlp.down_proj[17, 40] set to zero", layer=1, quality=only.quality)


def test_a_compressed_checkpoint_has_all_but_errors(tmp_path: Path) -> None:
    scheme = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8))
    folder = rounded(saved(tiny("llama").bfloat16(), tmp_path / "model"), tmp_path / "small", scheme)
    found = inspected(open_stored(folder), subject(tokens(SAMPLES, LENGTH), tokens(3, LENGTH, seed=5)))
    assert found.compressed
    assert all(site.errors == {} and site.channel_absmax for site in found.sites)
    assert found.interventions[0].quality > 1


@pytest.mark.parametrize("family", VISION)
def test_vision_models(family: str, tmp_path: Path) -> None:
    images = pixels(SAMPLES)
    positions = torch.arange(16 + topology(tiny_vision(family).config).lead).expand(SAMPLES, -1)
    about = Subject(samples=images, held_out=images[-2:], ids_NL=positions, text=str, start=None, source="noise")
    found = inspect_model(
        open_checkpoint(saved(tiny_vision(family), tmp_path / "model")),
        about,
        name="tiny",
        quality=lambda _runner, _batches, streams: [0.0 for _ in streams],
        unit="feature change",
        thresholds=Thresholds(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert (found.family, found.blocks, found.length, found.prefix) == (family.partition("-")[0], 2, positions.shape[1], None)
    assert found.landscapes[0].tokens == tuple(map(str, range(positions.shape[1])))
    assert all(site.ordinary == site.every for site in found.sites)
