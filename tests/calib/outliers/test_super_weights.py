"""Super weights: planted ones are found at their places in every family, nothing is found where none is, and nothing is left behind."""

from pathlib import Path

import pytest
import torch
from helpers_stored import rounded, saved
from tiny_models import CONFIGS, RELATIVES, tiny, tokens
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from planish.calib.blocks.sites import reader_weight
from planish.calib.blocks.topology import topology
from planish.calib.compressed.stored import open_any
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.outliers.diagnosis import SuperWeight, Thresholds
from planish.calib.outliers.super_weights import SuperWeightSearch, last_layers, published, without
from planish.calib.walk.runner import BlockRunner
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat

HUGE = 3000.0
Coordinates = set[tuple[int, int, int]]


def down_of(model: PreTrainedModel, layer: int) -> str:
    return topology(model.config).block(layer).inside[-1].readers[0]


def down_weight(model: PreTrainedModel, layer: int) -> Tensor:
    return reader_weight(model.get_submodule(f"{topology(model.config).blocks}.{layer}.{down_of(model, layer)}")).detach()


def planted(family: str, places: Coordinates, factor: float = HUGE) -> PreTrainedModel:
    """A tiny model whose weights there are scaled up; they are of ordinary size before, lest the scaled ones stay small."""
    model = tiny(family)
    for layer, row, column in places:
        weight_OI = down_weight(model, layer)
        weight_OI[row, column] = factor * weight_OI.abs().mean()
    return model


def search(folder: Path, ids: Tensor | None = None) -> tuple[list[SuperWeight], list[Tensor]]:
    """Super weights of a checkpoint, and the hidden states after each block."""
    runner = BlockRunner(open_any(folder), torch.float32, torch.device("cpu"))
    ((hidden, call),) = runner.start([tokens() if ids is None else ids])
    looking, outputs = SuperWeightSearch(), []
    for index in range(runner.topology.block_count):
        block = runner.load_block(index)

        def run(h: Tensor, block: nn.Module = block, index: int = index) -> Tensor:
            return call.run(block, index, h)

        with torch.no_grad():
            expected = run(hidden)
        layers = last_layers(block, runner.topology, index)
        hidden = looking.step(layers, run, hidden, layer=index)
        assert torch.equal(hidden, expected)
        assert not any(layer._forward_hooks for layer in layers.values())
        outputs.append(hidden)
        runner.release_block(index)
    return looking.found, outputs


def places_of(found: list[SuperWeight]) -> Coordinates:
    return {(weight.layer, weight.row, weight.column) for weight in found}


@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_none_planted_none_found(family: str, tmp_path: Path) -> None:
    assert search(saved(tiny(family), tmp_path / "model"))[0] == []


@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_one_planted(family: str, tmp_path: Path) -> None:
    model = planted(family, {(1, 7, 30)})
    (weight,), _ = search(saved(model, tmp_path / "model"))
    assert (weight.layer, weight.row, weight.column) == (1, 7, 30)
    assert weight.module == f"{topology(model.config).blocks}.1.{down_of(model, 1)}"
    assert weight.value == float(down_weight(model, 1)[7, 30])
    assert weight.activation * weight.value == pytest.approx(weight.output, rel=0.5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt2", "opt-gelu", "gpt_neox"])
@pytest.mark.parametrize(
    "places",
    [{(1, 7, 30), (1, 50, 31)}, {(1, 7, 30), (1, 7, 31)}, {(1, 7, 30), (1, 50, 30)}, {(0, 7, 30), (1, 50, 31)}],
    ids=["one layer", "one row", "one column", "two layers"],
)
def test_two_planted(family: str, places: Coordinates, tmp_path: Path) -> None:
    assert places_of(search(saved(planted(family, places), tmp_path / "model"))[0]) == places


def test_a_small_one_beside_a_large_one(tmp_path: Path) -> None:
    model = planted("llama", {(1, 7, 30)}, factor=1e6)
    down_weight(model, 1)[50, 31] = HUGE * 0.1
    found, _ = search(saved(model, tmp_path / "model"))
    assert [(weight.row, weight.column) for weight in found] == [(7, 30), (50, 31)]
    assert abs(found[0].output) > 100 * abs(found[1].output)


def test_of_a_compressed_model(tmp_path: Path) -> None:
    source = saved(planted("llama", {(1, 7, 30)}), tmp_path / "model")
    scheme = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8))
    (weight,), _ = search(rounded(source, tmp_path / "small", scheme))
    assert (weight.layer, weight.row, weight.column) == (1, 7, 30)
    original = float(down_weight(planted("llama", {(1, 7, 30)}), 1)[7, 30])
    assert weight.value == pytest.approx(original, rel=0.01)


class Mlp(nn.Module):
    """Only what a search needs of a block: hidden states that go straight into a linear layer."""

    def __init__(self, inputs: int = 200, outputs: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, outputs)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)

    def forward(self, u: Tensor) -> Tensor:
        result: Tensor = self.down(u)
        return result


def inputs(width: int = 200) -> Tensor:
    """(1, 40, width) with a spike of 3,000 at token 0, channel 9."""
    u = torch.randn(1, 40, width, generator=torch.Generator().manual_seed(4))
    u[0, 0, 9] = 3000
    return u


def look(block: Mlp, u: Tensor, **thresholds: float) -> list[tuple[int, int]]:
    looking = SuperWeightSearch(Thresholds(**thresholds))
    looking.step({"down": block.down}, block, u, layer=0)
    return [(weight.row, weight.column) for weight in looking.found]


def test_the_papers_pair_of_spikes() -> None:
    """The weight is the largest of its column but no outlier of its layer; the rest of the column, which is large too, does not count."""
    block = Mlp()
    with torch.no_grad():
        block.down.weight[20, 9] = 1.5
    assert 1.5 / float(block.down.weight.detach().abs().median()) < 50
    assert look(block, inputs()) == [(20, 9)]
    assert len(look(block, inputs(), spike_left=1e-3, spike_ratio=50)) > 10


@pytest.mark.parametrize("setting", [{"spike_floor": 1e4}, {"spike_ratio": 1e6}], ids=str)
def test_a_spike_must_pass_floor_and_ratio(setting: dict[str, float]) -> None:
    block = Mlp()
    with torch.no_grad():
        block.down.weight[20, 9] = 1.5
    assert look(block, inputs(), **setting) == []


def test_a_spike_that_no_single_product_explains() -> None:
    """Ten inputs that spike together and ten like weights: no one of them makes half of the output."""
    block, u = Mlp(), inputs()
    u[0, 0, :10] = 3000
    with torch.no_grad():
        block.down.weight[20, :10] = 1.5
    assert look(block, u) == []
    assert set(look(block, u, spike_share=0.05)) > {(20, k) for k in range(5)}


def test_what_an_earlier_one_brings_about_is_not_reported() -> None:
    """Two layers: the second passes on the spike that the first one's super weight makes."""
    first, second = Mlp(), Mlp(inputs=64)
    with torch.no_grad():
        first.down.weight[20, 9] = 1.5
        second.down.weight[5, 20] = 6.0
    looking = SuperWeightSearch()
    hidden = looking.step({"0.down": first.down}, first, inputs(), layer=0)
    assert look(second, hidden) == [(5, 20)]
    looking.step({"1.down": second.down}, second, hidden, layer=1)
    assert [(weight.module, weight.row, weight.column) for weight in looking.found] == [("0.down", 20, 9)]


def test_behind_a_relu_and_at_zero() -> None:
    """The median is that of values that are not 0; where all are, nothing is found."""
    block, u = Mlp(), inputs().relu() * (torch.rand(1, 40, 200, generator=torch.Generator().manual_seed(5)) > 0.8)
    assert u.median() == 0
    u[0, 0, 9] = 0
    assert look(block, u) == []
    assert look(block, torch.zeros(1, 40, 200)) == []


def test_without_restores() -> None:
    block = Mlp()
    before = block.down.weight.detach().clone()
    with without(block.down, [(3, 4), (5, 6)]):
        assert block.down.weight[3, 4] == block.down.weight[5, 6] == 0
        assert int((block.down.weight != before).sum()) == 2
    with pytest.raises(ValueError, match="stop"), without(block.down, [(3, 4)]):
        raise ValueError("stop")
    assert torch.equal(block.down.weight, before)


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("llama", LLAMA_7B, {(2, 3968, 7003)}),
        ("llama", {**LLAMA_7B, "max_position_embeddings": 4096}, {(1, 2533, 7890)}),
        ("llama", {**LLAMA_7B, "vocab_size": 32001}, None),
        ("mistral", {"num_key_value_heads": 8}, {(1, 2070, 7310)}),  # the class's defaults are that model's
        ("mistral", {"sliding_window": None}, None),
        (
            "olmo",
            {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 50304, "max_position_embeddings": 4096},
            {(1, 1764, 1710), (1, 1764, 8041), (2, 1764, 8041)},
        ),
        ("gpt2", {}, None),
    ],
)
def test_published(kind: str, sizes: dict[str, int | None], expected: Coordinates | None) -> None:
    assert published(AutoConfig.for_model(kind, **sizes)) == expected


def test_a_checkpoint_of_no_known_size(llama_folder: Path) -> None:
    assert published(open_checkpoint(llama_folder).config) is None
