"""planish.recipe.schema: shipped recipes, files, settings, and the rules across fields."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.calib.data.windows import Calibration
from planish.common.decode import encode
from planish.common.yamltext import parse_yaml
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.solvers import Clip, Gptaq, Gptq, Rtn
from planish.quant.transforms import Smooth
from planish.recipe.schema import Export, Override, Recipe, digest, load_recipe, shipped, shipped_text, to_yaml, with_settings

W4 = WeightFormat(bits=4)
W8 = WeightFormat(bits=8)
A8 = ActivationFormat(bits=8)
STATIC = ActivationFormat(bits=8, granularity="tensor", dynamic=False)
NAMES = (
    "paper-duquant",
    "paper-flatquant",
    "paper-gptaq",
    "paper-lorc",
    "paper-outliertune",
    "paper-prefixquant",
    "paper-quad",
    "paper-quarot",
    "paper-resq",
    "paper-smoothquant",
    "paper-smoothrot",
    "paper-spinquant",
    "paper-superweight",
    "paper-svdquant",
    "w4a16-best",
    "w4a16-channel",
    "w4a16-g128",
    "w4a4-auto",
    "w4a4-best",
    "w4a4-fast",
    "w4a4-learned",
    "w4a4-nvfp4",
    "w4a4-portable-mixed",
    "w4a8",
    "w4a8-best",
    "w4a8-portable",
    "w8a8",
    "w8a8-fp8",
    "w8a8-static",
)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PlanishError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "gptq"}, "solver is 'gptq'; in Python give planish.Gptq()."),
        ({"solver": "gptaq"}, "in Python give planish.Gptaq()."),
        ({"solver": {"rtn": {}}}, "solver is {'rtn': {}}; in Python give planish.Gptq()."),
        ({"steps": ["smooth"]}, "steps has 'smooth'; in Python give planish.quant.transforms.Smooth(...)."),
        ({"steps": ("rotate",)}, "steps has 'rotate'; in Python give planish.quant.transforms.Rotate(...)."),
        ({"steps": (None,)}, "steps has None; in Python give"),
        ({"steps": "smooth"}, "steps is 'smooth'; in Python give a tuple of steps"),
        ({"steps": [Smooth()]}, "steps is a list; in Python give a tuple of steps"),
    ],
)
def test_names_are_for_yaml(settings: dict[str, Any], words: str) -> None:
    given = {"solver": Rtn(), **settings}
    assert words in refusal(lambda: Recipe(name="own", scheme=Scheme(weights=W8, activations=A8), **given))


@pytest.mark.parametrize("path", ["calibration.seed", "steps.0.flat.seed", "steps.1.polish.seed", "steps.0.duquant.seed"])
def test_seeds_are_those_that_generators_take(path: str) -> None:
    steps = f"steps=[{'duquant' if 'duquant' in path else 'flat'}, polish]"
    recipe = with_settings(load_recipe("w4a4-best"), [steps, f"{path}={2**63 - 1}"])
    assert str(2**63 - 1) in to_yaml(recipe)
    for seed, words in ((2**63, f"seed is {2**63}, but must be at most {2**63 - 1} (2^63 - 1)"), (-1, "seed is -1, but must be at least 0")):
        assert words in refusal(lambda seed=seed: with_settings(load_recipe("w4a4-best"), [steps, f"{path}={seed}"]))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        *((text, True) for text in ("x: *.down", "x: *down", "x: @a", "x: `a", "x: &", "x: !a", "x: |a")),
        *((text, False) for text in ("x: [", "x: {a: b", "a: b: c", "a: 1\na: 2", "a:\n\tb: 1", "- a\nb: c")),
    ],
)
def test_quotes_are_advised_where_they_help(text: str, hint: bool) -> None:
    assert ("stands in quotes" in refusal(lambda: parse_yaml(text, "mine"))) is hint


def test_shipped_recipes() -> None:
    assert tuple(shipped()) == NAMES
    assert all(len(description) > 20 for description in shipped().values())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_round_trips(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert shipped_text(name).startswith("# ")
    for defaults in (False, True):
        path = tmp_path / f"{defaults}.yaml"
        path.write_text(to_yaml(recipe, defaults=defaults), encoding="utf-8")
        assert load_recipe(path) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(encode(recipe)), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_yaml_and_python_are_the_same() -> None:
    assert load_recipe("w8a8") == Recipe(
        name="w8a8",
        description=load_recipe("w8a8").description,
        calibration=Calibration(samples=32, length=512),
        steps=(Smooth(strength="auto"),),
        scheme=Scheme(weights=W8, activations=A8),
        solver=Gptq(damping=0.01),
    )


def test_unknown_shipped_recipe() -> None:
    assert refusal(lambda: load_recipe("w8a9")) == "recipe w8a9: neither a shipped recipe nor a file. Did you mean w8a8?"
    assert refusal(lambda: shipped_text("w8a9")) == "recipe w8a9 is not shipped. Did you mean w8a8?"


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert refusal(lambda: load_recipe(path)).startswith(
        f"recipe {path}: cannot be read: No such file or directory. Give a file, or one of {NAMES[0]}"
    )
    assert "Is a directory" in refusal(lambda: load_recipe(tmp_path))


FILE_ERRORS = {
    "empty": ("# nothing\n", ": is empty."),
    "list": ("- a\n", ": expected a mapping with the keys name, description, calibration,"),
    "syntax": ("name: a\nscheme: {weights: {bits: 8}\n", ", line 3: "),
    "duplicate": ("name: a\nname: b\n", ", line 2: duplicate key 'name'."),
    "no scheme": ("name: a\nsolver: rtn\n", ": scheme: missing. It has no default: give a mapping with the keys weights, activations."),
    "no solver": ("name: a\nscheme: {weights: {bits: 8}}\n", ": solver: missing. It has no default: give one of rtn, gptq, gptaq."),
    "unknown key": ("calibration: {smaples: 8}\n", ": calibration.smaples: unknown key. Did you mean samples?"),
    "wrong type": ("calibration: {samples: many}\n", ": calibration.samples: expected a whole number, got 'many'."),
    "impossible": ("calibration: {samples: 0}\n", ": calibration.samples is 0"),
    "unknown step": ("steps: [smoothe]\n", ": steps.0: unknown name 'smoothe'. Did you mean smooth?"),
    "unknown solver": ("solver: gtpq\n", ": solver: unknown name 'gtpq'. Did you mean gptq"),
    "unknown setting": ("solver: {gptq: {dampning: 0.1}}\n", ": solver.gptq.dampning: unknown key. Did you mean damping?"),
    "two solvers": ("solver: {gptq: {}, rtn: {}}\n", ": solver: takes exactly one of rtn, gptq, gptaq, got gptq and rtn."),
    "strength": ("steps: [smooth: {strength: 2}]\n", ": steps.0.smooth.strength is 2.0, but it lies in [0, 1]."),
    "block of no channels": ("steps: [hadamard: {block: 0}]\n", ": steps.0.hadamard.block is 0, but a block has at least 1 channel."),
    "search of fewer than no steps": ("steps: [duquant: {steps: -1}]\n", ": steps.0.duquant.steps is -1, but it counts steps of a search"),
    "bits": ("scheme: {weights: {bits: 16}}\n", ": scheme.weights.bits is 16, but integer formats have 2 to 8 bits."),
    "group": ("scheme: {weights: {bits: 4, group_size: 64}}\n", ": scheme.weights: granularity channel with group_size 64."),
    "static per token": ("scheme: {activations: {bits: 4, dynamic: false}}\n", ": scheme.activations: static with granularity token."),
    "granularity": (
        "scheme: {weights: {bits: 4, granularity: chanel}}\n",
        ": scheme.weights.granularity: expected 'tensor' or 'channel' or 'group', got 'chanel'.",
    ),
    "override with nothing": ('overrides: [{sites: "*.o"}]\n', ": overrides.0: override: give either scheme, or keep: true"),
    "override with both": ("overrides: [{sites: [a], keep: true, scheme: {}}]\n", ": overrides.0: override: give either scheme, or keep: true"),
    "override of nothing": ("overrides: [{sites: [], keep: true}]\n", ": overrides.0: override: sites is empty."),
    "shard size": ("export: {shard_size: 5 gigs}\n", ": export.shard_size is '5 gigs', but a size is a number and a unit"),
    "tiny shard": ("export: {shard_size: 5kB}\n", ": export.shard_size is 5kB, but a shard has at least 1MB."),
    "format": ("export: {format: gguf}\n", ": export.format: expected 'compressed-tensors', got 'gguf'."),
}


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS.values(), ids=FILE_ERRORS.keys())
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    given_keys = {line.split(":")[0] for line in text.splitlines()}
    if not given_keys & {"name", "# nothing", "- a"}:
        rest = {"name": "name: a\n", "scheme": "scheme: {weights: {bits: 8}}\n", "solver": "solver: rtn\n"}
        text += "".join(line for key, line in rest.items() if key not in given_keys)
    path.write_text(text, encoding="utf-8")
    assert refusal(lambda: load_recipe(path)).startswith(f"recipe {path}{message}")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(lambda: load_recipe(path)) == f"recipe {path}: not a text file in UTF-8."


def test_bare_names_and_exponents(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: a\nsteps: [smooth]\nscheme: {weights: {bits: 8}, activations: {bits: 8}}\nsolver: {gptaq: {damping: 1e-3}}\n", encoding="utf-8"
    )
    assert load_recipe(path) == Recipe(name="a", steps=(Smooth(),), scheme=Scheme(weights=W8, activations=A8), solver=Gptaq(damping=1e-3))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 << 29), ("2000000B", 2000000), ("1TiB", 1 << 40)])
def test_shard_size(text: str, size: int) -> None:
    assert Export(shard_size=text).shard_bytes == size


def test_something_must_be_quantized() -> None:
    assert "quantizes nothing" in refusal(lambda: Recipe(name="a", scheme=Scheme(), solver=Rtn()))
    Recipe(name="a", scheme=Scheme(), overrides=(Override(sites=("*.down",), scheme=Scheme(weights=W4)),), solver=Rtn())


def test_smoothing_needs_quantized_activations() -> None:
    text = refusal(lambda: Recipe(name="a", steps=(Smooth(),), scheme=Scheme(weights=W8), solver=Rtn()))
    assert text.startswith("steps: smooth makes activations easier to quantize, but none are quantized.")
    Recipe(
        name="a",
        steps=(Smooth(),),
        scheme=Scheme(weights=W8),
        overrides=(Override(sites=("*",), scheme=Scheme(weights=W8, activations=A8)),),
        solver=Rtn(),
    )


def test_what_needs_calibration_says_so() -> None:
    both = Scheme(weights=W8, activations=A8)
    Recipe(name="a", calibration=None, scheme=both, solver=Rtn(clip=Clip()))
    assert "the solver gptq cannot" in refusal(lambda: Recipe(name="a", calibration=None, scheme=both, solver=Gptq()))
    assert "the step smooth cannot" in refusal(lambda: Recipe(name="a", calibration=None, steps=(Smooth(),), scheme=both, solver=Rtn()))
    static = Scheme(weights=W8, activations=STATIC)
    text = refusal(
        lambda: Recipe(name="a", calibration=None, steps=(Smooth(),), scheme=both, overrides=(Override(sites=("*",), scheme=static),), solver=Gptaq())
    )
    assert "the step smooth and the solver gptaq and a static activation scale cannot" in text


def test_settings_change_what_they_name() -> None:
    settings = [
        "calibration.samples=64",
        "solver.gptq.damping=5e-2",
        "scheme.weights.bits=4",
        "steps.smooth.strength=0.5",
        "calibration.source=a b.txt",
    ]
    recipe = with_settings(load_recipe("w8a8"), settings)
    assert recipe.calibration == Calibration(samples=64, source="a b.txt")
    assert recipe.solver == Gptq(damping=0.05)
    assert recipe.scheme == Scheme(weights=W4, activations=A8)
    assert recipe.steps == (Smooth(strength=0.5),)
    assert with_settings(recipe, []) is recipe


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["steps.0.smooth.sites=*.qkv"], Smooth(sites=("*.qkv",))),
        (["steps.0.smooth.sites=['*.qkv', 1.*]"], Smooth(sites=("*.qkv", "1.*"))),
        (["steps=[smooth]", "steps.smooth.strength=1"], Smooth(strength=1.0)),
        (["steps=smooth: {strength: 1}", "steps=[{smooth: {strength: 0}}]"], Smooth(strength=0.0)),
    ],
)
def test_settings_in_steps(settings: list[str], expected: Smooth) -> None:
    assert with_settings(load_recipe("w8a8"), settings).steps == (expected,)


def test_settings_replace_wholes() -> None:
    base = load_recipe("w8a8")
    assert with_settings(base, ["solver=rtn", "steps=[]", "calibration=null"]) == Recipe(
        name="w8a8", description=base.description, calibration=None, scheme=base.scheme, solver=Rtn()
    )
    assert with_settings(base, ["solver=gptaq", "solver.gptaq.alpha=0.5"]).solver == Gptaq(alpha=0.5)
    assert with_settings(base, ["solver=rtn", "solver.rtn.clip.grid=50"]).solver == Rtn(clip=Clip(grid=50))
    assert with_settings(base, ["scheme.activations.granularity=tensor", "scheme.activations.dynamic=false"]).scheme.activations == STATIC
    assert with_settings(load_recipe("w4a8"), ["scheme.activations="]).scheme == Scheme(weights=W4)


SETTING_ERRORS = {
    "no sign": ("calibration.samples", "'calibration.samples' is not a setting. Write path=value, such as calibration.samples=64."),
    "empty path": ("=3", "'=3' is not a setting."),
    "empty key": ("calibration..samples=3", "'calibration..samples=3' is not a setting."),
    "unknown": ("calibration.smaples=3", "recipe w8a8 with calibration.smaples=3: calibration.smaples: unknown key. Did you mean samples?"),
    "unknown at the top": ("calibratoin.samples=3", "recipe w8a8 with calibratoin.samples=3: calibratoin: unknown key. Did you mean calibration?"),
    "wrong type": ("calibration.samples=few", "recipe w8a8 with calibration.samples=few: calibration.samples: expected a whole number, got 'few'."),
    "inside a scalar": ("calibration.samples.many=3", "calibration.samples.many=3: there is nothing named many inside 32."),
    "other solver": (
        "solver.rtn.clip=null",
        "recipe w8a8 with solver.rtn.clip=null: solver: takes exactly one of rtn, gptq, gptaq, got gptq and rtn.",
    ),
    "no such item": ("steps.1.smooth.strength=1", "steps.1.smooth.strength=1: 1 stands for 0 items of a list of 1. Positions count from 0."),
    "no such step": ("steps.rotate.strength=1", "steps.rotate.strength=1: rotate stands for 0 items of a list of 1."),
    "no items": ("overrides.0.keep=true", "overrides.0.keep=true: 0 stands for 0 items of a list of 0."),
    "no yaml": ("calibration.source=[", "calibration.source=[, line 1: "),
    "rule across": ("scheme.activations=null", "recipe w8a8 with scheme.activations=null: steps: smooth makes activations easier"),
}


@pytest.mark.parametrize(("setting", "message"), SETTING_ERRORS.values(), ids=SETTING_ERRORS.keys())
def test_bad_settings(setting: str, message: str) -> None:
    assert refusal(lambda: with_settings(load_recipe("w8a8"), [setting])).startswith(message)


def test_digest_follows_equality() -> None:
    recipe = load_recipe("w8a8")
    assert len(digest(recipe)) == 64
    assert digest(with_settings(recipe, ["steps.smooth.strength=1"])) == digest(with_settings(recipe, ["steps.smooth.strength=1.0"]))
    whole = Recipe(name="a", steps=(Smooth(strength=1),), scheme=Scheme(weights=W8, activations=A8), solver=Rtn())
    assert digest(whole) == digest(Recipe(name="a", steps=(Smooth(strength=1.0),), scheme=Scheme(weights=W8, activations=A8), solver=Rtn()))
    assert digest(with_settings(recipe, ["calibration.seed=1"])) != digest(recipe)
