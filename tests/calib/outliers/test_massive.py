"""Massive activations along the depth: planted ones are found with their place, value and life, and nothing else is."""

import pytest
import torch
from torch import Tensor

from planish.calib.outliers.diagnosis import Thresholds
from planish.calib.outliers.massive import Birth, Magnitudes

SAMPLES, LENGTH, WIDTH = 4, 16, 32
LIMITS = Thresholds()


def quiet(seed: int = 0) -> Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def followed(layers: list[Tensor], ids_NL: Tensor | None = None, batch: int = SAMPLES) -> tuple[Magnitudes, list[tuple[Birth, ...]]]:
    magnitudes = Magnitudes(LIMITS, SAMPLES, ids_NL)
    return magnitudes, [magnitudes.add(layer, hidden.split(batch)) for layer, hidden in enumerate(layers, -1)]


def test_layers_are_described_as_by_hand() -> None:
    hidden = quiet()
    hidden[1, 3, 5], hidden[2, 0, 0] = -5000, 300
    magnitudes, _ = followed([hidden])
    (record,) = magnitudes.layers
    size = hidden.abs()
    assert record.layer == -1
    assert record.top == pytest.approx(size.flatten(1).topk(3).values.mean(0).tolist())
    assert record.median == pytest.approx(torch.stack([one.median() for one in size]).mean().item())
    assert (record.massive, record.large) == (1, 2)
    norm = hidden.norm(dim=2)
    assert record.residual_peak == pytest.approx((norm[:, 0] / norm.median(1).values).mean().item())


@pytest.mark.parametrize("batch", [1, 3, SAMPLES])
def test_a_massive_activation_has_a_life(batch: int) -> None:
    layers = [quiet(seed) for seed in range(5)]
    values = torch.tensor([9000.0, 9100.0, 9200.0, 9300.0])
    for layer in (2, 3):
        layers[layer][:, 0, 7] = values
    magnitudes, births = followed(layers, ids(), batch)
    assert births == [(), (), (Birth(7, 0, 9150.0),), (), ()]
    (found,) = magnitudes.activations(str)
    assert (found.channel, found.position, found.token, found.born, found.died, found.massive, found.share) == (7, 0, None, 1, 3, True, 1.0)
    assert found.value == pytest.approx(9150)
    assert found.largest == pytest.approx(9300)
    assert found.constant
    assert found.spread == pytest.approx(values.std(correction=0).item() / 9150)
    assert found.ratio == pytest.approx(9150 / magnitudes.layers[found.layer + 1].median)
    assert found.by_layer == pytest.approx([layer[:, 0, 7].mean().item() for layer in layers])


def test_it_may_live_to_the_end_and_depend_on_the_input() -> None:
    layers = [quiet(0), quiet(1)]
    layers[1][:, 2, 9] = torch.tensor([2000.0, -4000.0, 6000.0, 9000.0])
    (found,) = followed(layers)[0].activations(str)
    assert (found.position, found.born, found.died, found.constant, found.largest) == (2, 0, None, False, 9000.0)


def test_a_token_at_varying_positions() -> None:
    ids_NL, layers = ids(), [quiet(0), quiet(1), quiet(2)]
    places = [(0, 3), (1, 12), (2, 5), (3, 9)]
    for sample, position in places:
        ids_NL[sample, position] = 2
        layers[1][sample, position, 4] = -7000
    magnitudes, births = followed(layers, ids_NL, batch=2)
    assert births[1] == (Birth(4, None, -7000.0),)
    (found,) = magnitudes.activations(lambda token: f"<{token}>")
    assert (found.channel, found.position, found.token, found.value, found.share) == (4, None, "<2>", -7000.0, 1.0)
    after = sum(layers[2][sample, position, 4].item() for sample, position in places) / 4
    assert found.by_layer == pytest.approx([0.0, -7000.0, after])


def test_a_channel_that_is_large_everywhere_is_one_entry() -> None:
    hidden = quiet()
    hidden[:, :, 6] = 400
    (found,) = followed([hidden])[0].activations(str)
    assert (found.channel, found.position, found.massive, found.share) == (6, None, False, 1.0)


def test_one_stray_value_in_many_samples_is_counted_but_makes_no_entry() -> None:
    hidden = torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden[5, 3, 1] = 1e5
    magnitudes = Magnitudes(LIMITS, 8)
    assert magnitudes.add(-1, [hidden]) == ()
    assert magnitudes.layers[0].massive == 1
    assert magnitudes.activations(str) == ()


def test_what_some_samples_have_at_one_position_only_is_of_that_position() -> None:
    hidden = quiet()
    hidden[1:3, 5, 4] = 9000.0  # channel 4: in half of the samples at position 5, and nowhere else
    hidden[0, 2, 6] = hidden[3, 9, 6] = 9000.0  # channel 6: at two positions
    hidden[0, 3, 8] = 9000.0  # channel 8: once, which tells nothing
    magnitudes, births = followed([hidden])
    found = magnitudes.activations(str)
    assert {(one.channel, one.position, one.share) for one in found} == {(4, 5, 0.5), (6, None, 0.5), (8, None, 0.25)}
    assert {birth.position for birth in births[0]} == {None}, "a change is made where a value is massive, not in the other samples"


def test_the_floor_and_the_ratio_are_settings() -> None:
    hidden = quiet() * 0.01
    hidden[:, 0, 3] = 20.0  # some 3,000 times the median, but below the floor
    for limits, massive in ((LIMITS, False), (Thresholds(massive_floor=10), True), (Thresholds(massive_floor=10, massive_ratio=1e4), False)):
        magnitudes = Magnitudes(limits, SAMPLES)
        magnitudes.add(-1, [hidden])
        assert [one.massive for one in magnitudes.activations(str)] == [massive]


@pytest.mark.parametrize("hidden", [quiet(), torch.zeros(SAMPLES, LENGTH, WIDTH), quiet()[:, :1], quiet().bfloat16()])
def test_ordinary_states_hold_nothing(hidden: Tensor) -> None:
    magnitudes, births = followed([hidden, hidden])
    assert births == [(), ()]
    assert magnitudes.activations(str) == ()
    assert [(record.massive, record.large) for record in magnitudes.layers] == [(0, 0), (0, 0)]
