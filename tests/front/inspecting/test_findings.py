"""Findings in words: the sentences that a reader needs, with the report's own numbers, the gravest first."""

from dataclasses import replace

import pytest
from helpers_inspect import bare_report, compressed_report, smollm2_report

from planish.calib.outliers.diagnosis import Figures, Intervention, OutlierReport, OutlierToken, SuperWeight
from planish.calib.outliers.interventions import AVERAGED, UNCHANGED, ZEROED
from planish.inspecting.findings import findings


def known() -> OutlierReport:
    """SmolLM2's report, with the tails that its down inputs have."""
    report = smollm2_report()
    tails = {2: 39_000.0, 9: 8_600.0, 10: 4_400.0}

    def ordinary(block: int, figures: Figures) -> Figures:
        return replace(figures, kurtosis=tails.get(block, 60.0))

    sites = tuple(
        replace(site, ordinary=ordinary(site.block, site.ordinary) if site.site == "down" else replace(site.ordinary, kurtosis=60.0))
        for site in report.sites
    )
    return replace(report, sites=sites)


def one(report: OutlierReport, beginning: str) -> str:
    (found,) = (sentence for sentence in findings(report) if sentence.startswith(beginning))
    return found


def test_massive_activations_with_their_companions() -> None:
    first = findings(known())[0]
    assert 'Channel 507 carries 25,300 on average, at most 25,690, at position 0 ("<|im_start|>")' in first
    assert "Born in layer 11's output, it lives to layer 27's." in first
    assert "nearly the same in every sample" in first
    assert "Channels 247 (−2,140), 14 (1,610) and 100 (−1,130) stand out there too." in first


@pytest.mark.parametrize(
    ("zeroed", "averaged", "words"),
    [
        (
            6183.4,
            20.31,
            ("ruins the model (perplexity 20.25 to 6,180, 305 times)", "constant bias, not information (perplexity 20.25 to 20.31, +0.3%)"),
        ),
        (22.0, 21.5, ("harms the model (perplexity 20.25 to 22.00, +8.6%)", "they carry information (perplexity 20.25 to 21.50, +6.2%)")),
        (20.3, 20.25, ("hardly changes the model", "changes as little")),
    ],
)
def test_what_they_are_worth(zeroed: float, averaged: float, words: tuple[str, ...]) -> None:
    quality = {UNCHANGED: 20.25, ZEROED: zeroed, AVERAGED: averaged}
    changes = tuple(Intervention(name=name, layer=None if name == UNCHANGED else 11, quality=value) for name, value in quality.items())
    found = one(replace(known(), interventions=changes), "Setting the massive activations born in layer 11's output to zero")
    assert all(part in found for part in words)


def test_which_layers_become_mild_and_which_stay_hard() -> None:
    spiked, hard = findings(known())[2:4]
    assert "The input of down reaches 3,183 in layer 11 and 2,384 in layer 28, at position 0 only" in spiked
    assert "without position 0, layers 11 and 28 become mild" in spiked
    assert "The input of down in layers 2, 9 and 10 stays hard without position 0: kurtosis 39,000 in layer 2" in hard


def test_super_weights() -> None:
    found = one(known(), "Super weight")
    spikes = "stands between an input of −3,183 and an output of 6,120"
    assert f"[507, 1021] = −1.92 {spikes}; without it: perplexity 20.25 to 212.70, +950.4%." in found
    weight = SuperWeight(module="m", layer=1, row=2, column=3, value=1.0, activation=60.0, output=70.0, published=True)
    many = findings(replace(known(), super_weights=(weight,) * 6))
    assert sum("It is in the published index." in sentence for sentence in many) == 4
    assert "2 more super weights: m[2, 3] and m[2, 3]." in many


def test_tokens_heads_and_rounding() -> None:
    report = known()
    assert one(report, "The first token is an outlier in every sample")
    later = r'Outlier tokens beyond the first: "\n" (in 3 of the 32 samples that hold it).'
    assert one(report, "Outlier tokens") == later
    assert one(report, "Suggested prefix").endswith('"<|im_start|>"; no other token is an outlier in most of the samples that hold it.')
    some = replace(report, outlier_tokens=(OutlierToken(token_id=5, text="a", count=2, initial=2, inside=0, present=9, ratio=70.0, site="2.down"),))
    assert "in 2 of 32 samples" in one(some, "The first token")
    assert one(report, f"{len(report.sink_heads)} of 270 heads are sink heads")
    assert "a Hadamard rotation" in one(report, "Rounded plainly to W4A4")


def test_of_a_compressed_model_rounding_is_not_spoken_of() -> None:
    assert not any("Rounded" in sentence for sentence in findings(compressed_report()))


def test_nothing_found_is_said_too() -> None:
    first, second = findings(bare_report())
    assert first.startswith("No massive activations")
    assert second.startswith("No super weights")


def test_changes_of_features() -> None:
    quality = {UNCHANGED: 0.0, ZEROED: 0.9, AVERAGED: 0.004}
    changes = tuple(Intervention(name=name, layer=None if name == UNCHANGED else 3, quality=value) for name, value in quality.items())
    found = one(replace(known(), quality="feature change", interventions=changes), "Setting")
    assert "ruins the model (feature change 90.0%)" in found
    assert "(feature change 0.4%)" in found
