"""The recommended recipe: what is measured decides, and every recipe is one that compress takes."""

from dataclasses import replace

import pytest
from helpers_inspect import compressed_report, smollm2_report

from planish.common.decode import decode
from planish.common.yamltext import parse_yaml
from planish.inspecting.recommend import BASES, recommend
from planish.quant.errors import PlanishError
from planish.recipe.schema import Recipe, load_recipe


@pytest.fixture(scope="module")
def report():
    return smollm2_report()


def recipe(report, bits):
    found = recommend(report, bits)
    assert found is not None
    return decode(Recipe, parse_yaml(found.recipe, "it"), "it")


def with_errors(report, change):
    """The report with each site's errors changed: change(site, scheme, transform, error) -> error."""
    sites = (
        replace(site, errors={scheme: {how: change(site, scheme, how, error) for how, error in row.items()} for scheme, row in site.errors.items()})
        for site in report.sites
    )
    return replace(report, sites=tuple(sites))


@pytest.mark.parametrize("bits", BASES)
def test_keeps_the_bits_and_the_solver_of_the_shipped_recipe(report, bits):
    made, base = recipe(report, bits), load_recipe(BASES[bits])
    assert (made.solver, made.calibration, made.scheme.weights) == (base.solver, base.calibration, base.scheme.weights)
    wanted = {"w4a4": 4, "w4a16": None}.get(bits, 8)
    assert (made.scheme.activations and made.scheme.activations.bits) == wanted


@pytest.mark.parametrize("bits", BASES)
def test_every_choice_has_a_reason_and_stands_in_the_file(report, bits):
    found = recommend(report, bits)
    assert len(found.choices) >= 2
    for choice in found.choices:
        assert choice.what
        assert choice.why.endswith(".")
        assert f"{choice.what}: {choice.why}" in " ".join(line.lstrip("# ") for line in found.recipe.splitlines())


def test_smoothing_goes_where_it_helps(report):
    helped = with_errors(report, lambda site, _scheme, how, error: error * (0.5 if how == "smooth" and site.site == "qkv" else 1.0))
    useless = with_errors(helped, lambda site, _scheme, how, error: site.errors[_scheme]["plain"] if how == "smooth" else error)
    helps_one = with_errors(useless, lambda site, _scheme, how, error: error / 2 if how == "smooth" and site.site == "qkv" else error)
    assert [step.sites for step in recipe(helps_one, "w8a8").steps] == [("*.qkv",)]
    assert recipe(useless, "w8a8").steps == ()


def test_smoothing_everywhere_is_written_as_one_pattern(report):
    hosted = replace(report, sites=tuple(replace(site, hosted=True) for site in report.sites))
    helped = with_errors(hosted, lambda site, scheme, how, error: site.errors[scheme]["plain"] / 2 if how == "smooth" else error)
    assert [step.sites for step in recipe(helped, "w8a8").steps] == [("*",)]


def test_the_spike_is_named_as_the_reason_for_dynamic_scales(report):
    (why,) = (choice.why for choice in recommend(report, "w8a8").choices if choice.what.startswith("activations"))
    assert "11.down" in why
    assert "sink tokens reach" in why


def test_hard_sites_get_eight_bits_at_w4a4(report):
    hard = with_errors(report, lambda site, _scheme, _how, _error: 0.4 if site.site == "down" or site.name == "3.qkv" else 0.05)
    (override,) = recipe(hard, "w4a4").overrides
    assert override.sites == ("*.down", "3.qkv") or set(override.sites) == {"*.down", "3.qkv"}
    assert override.scheme.activations.bits == 8
    assert recipe(hard, "w4a4").scheme.activations.bits == 4
    easy = with_errors(report, lambda *_: 0.05)
    assert recipe(easy, "w4a4").overrides == ()


def test_where_most_sites_are_hard_the_easy_ones_are_the_exception(report):
    hard = with_errors(report, lambda site, _scheme, _how, _error: 0.05 if site.site == "qkv" or site.name == "3.o" else 0.4)
    made = recipe(hard, "w4a4")
    (override,) = made.overrides
    assert made.scheme.activations.bits == 8
    assert set(override.sites) == {"*.qkv", "3.o"}
    assert override.scheme.activations.bits == 4
    ruined = recipe(with_errors(report, lambda *_: 0.4), "w4a4")
    assert (ruined.scheme.activations.bits, ruined.overrides) == (8, ())


def test_text_of_the_user_is_calibrated_on(report):
    assert recipe(replace(report, text="mine.txt"), "w8a8").calibration.source == "mine.txt"


def test_nothing_for_compressed_and_vision_models(report):
    assert recommend(compressed_report(), "w8a8") is None
    assert recommend(replace(report, quality="feature change"), "w8a8") is None


def test_unknown_bits_name_the_near_ones(report):
    with pytest.raises(PlanishError, match="w4a8"):
        recommend(report, "w4a9")
