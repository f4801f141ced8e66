"""A step that finds nothing to do at its sites is not accepted in silence: the plan says so."""

from pathlib import Path

import pytest
from helpers_compress import quick

import planish

KEPT = "overrides=[{sites: ['*.o'], keep: true}]"
WEIGHTS = "overrides=[{sites: ['*.o'], scheme: {weights: {bits: 4}}}]"


@pytest.mark.parametrize(
    ("name", "steps", "settings", "message"),
    [
        ("w4a4-fast", "hadamard: {sites: '*.o'}", KEPT, "hadamard does nothing, for nothing is quantized at its sites"),
        ("w4a4-fast", "low_rank: {rank: 2, sites: '*.o'}", KEPT, "low_rank does nothing, for nothing is quantized at its sites"),
        ("w4a4-fast", "polish: {sites: '*.o'}", KEPT, "polish does nothing, for nothing is quantized at its sites"),
        ("w8a8", "smooth: {sites: '*.o'}", WEIGHTS, "smooth does nothing, for no activations are quantized at its sites"),
        ("w4a4-fast", "scale_rms: {sites: '*.o'}", WEIGHTS, "scale_rms does nothing, for no activations are quantized at its sites"),
        ("w4a4-fast", "clip: {sites: '*.o'}", WEIGHTS, "clip does nothing, for no activations have a dynamic range at its sites"),
        ("w4a16-channel", "clip", "export={}", "clip does nothing, for no activations have a dynamic range at its sites"),
    ],
)
def test_said(name: str, steps: str, settings: str, message: str, original: Path) -> None:
    assert f"steps: {message}." in planish.plan(quick(name, f"steps=[{steps}]", settings), original).notes


def test_one_site_is_enough(original: Path) -> None:
    notes = planish.plan(quick("w4a4-fast", "steps=[smooth, clip, hadamard: {sites: ['*.o', '0.down']}]", KEPT), original).notes
    assert not any("does nothing" in note for note in notes)


@pytest.mark.parametrize(("samples", "told"), [(1, True), (40, False)])
def test_text_of_fewer_tokens_than_channels(samples: int, told: bool, original: Path) -> None:
    """A solver's second moments of them are singular; rounding needs none."""
    little = (f"calibration.samples={samples}", "calibration.length=16")
    notes = planish.plan(quick("w4a16-channel", *little), original).notes
    assert any("calibration has 16 tokens, fewer than the" in note for note in notes) == told
    assert not any("tokens, fewer than" in note for note in planish.plan(quick("w4a16-channel", "solver=rtn", *little), original).notes)
