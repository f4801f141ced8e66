"""planish.recipe.resolve: patterns of sites, overrides, and groups that fit."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.calib.blocks.topology import BlockTopology, Site, Topology
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.solvers import Rtn
from planish.quant.transforms import Smooth
from planish.recipe.resolve import matches, resolve
from planish.recipe.schema import Override, Recipe, load_recipe, shipped, with_settings

W4 = WeightFormat(bits=4)
W8 = WeightFormat(bits=8)
A8 = ActivationFormat(bits=8)
G128 = WeightFormat(bits=4, granularity="group", group_size=128)

BLOCK = BlockTopology(
    family="llama",
    sites=tuple(Site(name=name, readers=(name,)) for name in ("qkv", "o", "gate_up", "down")),
    writers=("o", "down"),
    stream_readers=("qkv", "gate_up"),
    norm_offset=0.0,
    heads=9,
)
TOPOLOGY = Topology(
    family="llama",
    blocks="model.layers",
    kinds=(BLOCK,),
    kind_at=(0,) * 12,
    embeddings=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
    norm_kind="rms",
    norm_offset=0.0,
    heads=9,
)


def width(block: int, site: str) -> int:
    """Those of the demo model."""
    return 1536 if site == "down" else 576


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PlanishError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe_fits_the_demo_model(name: str) -> None:
    resolved = resolve(load_recipe(name), TOPOLOGY, width)
    assert all(scheme is not None for scheme in resolved.schemes.values())
    assert bool(resolved.notes) == (name in ("w4a16-best", "w4a16-g128"))


def test_matching() -> None:
    assert matches(["1.*"], 1, "down")
    assert not matches(["1.*"], 11, "down")
    assert matches(["x", "1?.down"], 11, "down")
    assert not matches(["*.Down"], 1, "down")
    assert not matches([], 1, "down")


def test_the_last_matching_override_holds() -> None:
    recipe = Recipe(
        name="a",
        scheme=Scheme(weights=W4, activations=A8),
        overrides=(
            Override(sites=("*.down", "0.*"), scheme=Scheme(weights=W8)),
            Override(sites=("11.down",), keep=True),
            Override(sites=("0.o",), scheme=Scheme()),
        ),
        solver=Rtn(),
    )
    resolved = resolve(recipe, TOPOLOGY, width)
    assert len(resolved.schemes) == 48
    assert resolved.schemes[5, "qkv"] == Scheme(weights=W4, activations=A8)
    assert resolved.schemes[5, "down"] == resolved.schemes[0, "qkv"] == Scheme(weights=W8)
    assert resolved.schemes[11, "down"] is None
    assert resolved.schemes[0, "o"] is None
    assert resolved.notes == ()


def test_pattern_that_matches_nothing() -> None:
    scheme = Scheme(weights=W8, activations=A8)
    recipe = Recipe(name="a", scheme=scheme, overrides=(Override(sites=("*.down", "12.*"), keep=True),), solver=Rtn())
    assert refusal(lambda: resolve(recipe, TOPOLOGY, width)) == (
        "recipe a: overrides.0.sites: '12.*' matches no site. Patterns are for block.site, such as 0.qkv or *.qkv: "
        "blocks 0 to 11, sites qkv, o, gate_up, down."
    )
    recipe = Recipe(name="a", steps=(Smooth(sites=("down",)),), scheme=scheme, solver=Rtn())
    assert refusal(lambda: resolve(recipe, TOPOLOGY, width)).startswith("recipe a: steps.0.sites: 'down' matches no site.")


def test_overrides_must_leave_something() -> None:
    recipe = Recipe(name="a", scheme=Scheme(weights=W8), overrides=(Override(sites=("*",), keep=True),), solver=Rtn())
    assert refusal(lambda: resolve(recipe, TOPOLOGY, width)).startswith("recipe a: overrides keep every site in full precision")


def grouped(fallback: str, size: int = 128) -> Recipe:
    return with_settings(load_recipe("w4a16-g128"), [f"group_fallback={fallback}", f"scheme.weights.group_size={size}"])


def test_group_that_does_not_divide_is_refused() -> None:
    assert refusal(lambda: resolve(grouped("refuse"), TOPOLOGY, width)) == (
        "recipe w4a16-g128: site 0.qkv: weights.group_size 128 does not divide its 576 input channels. "
        "Use a group_size of 64 or 32, granularity channel, or group_fallback: divisor."
    )
    assert "Use a group_size of 2 or 3 or 5 or 6 or 10 or 15 or 30, gran" in refusal(
        lambda: resolve(grouped("refuse"), TOPOLOGY, lambda block, site: 30)
    )
    assert "Use no groups, granularity channel" in refusal(lambda: resolve(grouped("refuse"), TOPOLOGY, lambda block, site: 131))


def test_group_fallbacks_are_said() -> None:
    resolved = resolve(grouped("divisor"), TOPOLOGY, width)
    assert resolved.schemes[3, "down"] == Scheme(weights=G128)
    assert resolved.schemes[3, "o"] == Scheme(weights=WeightFormat(bits=4, granularity="group", group_size=64))
    assert resolved.notes == ("gate_up, o, qkv: groups of 128 do not divide 576 input channels; groups of 64 instead.",)
    resolved = resolve(grouped("channel"), TOPOLOGY, width)
    assert resolved.schemes[3, "o"] == Scheme(weights=W4)
    assert resolved.notes == ("gate_up, o, qkv: groups of 128 do not divide 576 input channels; one scale per channel instead.",)
    assert resolve(grouped("divisor"), TOPOLOGY, lambda block, site: 30).schemes[0, "qkv"] == Scheme(weights=W4)


@given(st.integers(min_value=2, max_value=300), st.integers(min_value=1, max_value=5000))
def test_fitted_groups_divide_and_never_grow(size: int, channels: int) -> None:
    fitted = resolve(grouped("divisor", size), TOPOLOGY, lambda block, site: channels).schemes[0, "o"]
    assert fitted is not None
    assert fitted.weights is not None
    assert channels % fitted.weights.groups(channels) == 0
    assert (fitted.weights.group_size or 0) <= size
    if channels % size == 0:
        assert fitted.weights.group_size == size


def test_activation_groups_have_no_fallback() -> None:
    scheme = Scheme(weights=W8, activations=ActivationFormat(bits=8, granularity="group", group_size=100))
    text = refusal(lambda: resolve(Recipe(name="a", scheme=scheme, group_fallback="divisor", solver=Rtn()), TOPOLOGY, width))
    assert (
        text
        == "recipe a: site 0.qkv: activations.group_size 100 does not divide its 576 channels. Use a group_size of 64 or 32 or granularity token."
    )
