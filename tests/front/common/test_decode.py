"""planish.common.decode and planish.common.yamltext: strict both ways, and every refusal says where, what and what else."""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.common.decode import Named, decode, encode
from planish.common.yamltext import dump_yaml, parse_yaml
from planish.quant.errors import PlanishError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hammer:
    weight: float = 1.0
    grip: Literal["wood", "steel"] | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise PlanishError(f"hammer.weight is {self.weight}, but nothing weighs less than nothing.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Anvil:
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    pass


TOOLS = {"hammer": Hammer, "anvil": Anvil, "nothing": Nothing}
Tool = Annotated[Hammer | Anvil | Nothing, Named(TOOLS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    name: str
    open: bool = True
    count: int = 0
    level: float | Literal["auto", "off"] = "auto"
    either: float | int | str = 0
    tags: tuple[str, ...] = ()
    sizes: tuple[int | None, ...] = ()
    spare: Hammer | None = None
    tools: tuple[Tool, ...] = ()
    favourite: Tool | None = None
    nested: tuple[tuple[float, ...], ...] = field(default_factory=tuple)


finite = st.floats(allow_nan=False, allow_infinity=False)
hammers = st.builds(Hammer, weight=finite.map(abs), grip=st.sampled_from(["wood", "steel", None]))
tools = st.one_of(hammers, st.builds(Anvil, size=st.integers()), st.builds(Nothing))


def tuples(items: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(items, max_size=3).map(tuple)


shops = st.builds(
    Shop,
    name=st.text(),
    open=st.booleans(),
    count=st.integers(),
    level=st.one_of(finite, st.sampled_from(["auto", "off"])),
    either=st.one_of(st.integers(), finite, st.text()),
    tags=tuples(st.text()),
    sizes=tuples(st.one_of(st.none(), st.integers())),
    spare=st.one_of(st.none(), hammers),
    tools=tuples(tools),
    favourite=st.one_of(st.none(), tools),
    nested=tuples(tuples(finite)),
)


@given(shops, st.booleans())
def test_round_trip(shop: Shop, defaults: bool) -> None:
    plain = encode(shop, defaults=defaults)
    assert decode(Shop, plain, "shop") == shop
    assert decode(Shop, json.loads(json.dumps(plain)), "shop") == shop


@given(shops, st.booleans())
def test_round_trip_through_yaml(shop: Shop, defaults: bool) -> None:
    plain = encode(shop, defaults=defaults)
    assert parse_yaml(dump_yaml(plain), "shop") == plain


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), finite, st.text()), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_data_decodes_or_is_refused_with_its_place(data: object) -> None:
    try:
        shop = decode(Shop, {"name": "a", "level": data, "tags": data, "tools": data, "spare": data}, "shop")
    except PlanishError as error:
        place = str(error).split(": ")
    else:
        place = ["shop"]
        assert decode(Shop, encode(shop), "shop") == shop
    assert place[0] == "shop"


def test_defaults_are_left_out() -> None:
    assert encode(Shop(name="a", tools=(Hammer(), Anvil(size=2))), defaults=False) == {"name": "a", "tools": ["hammer", {"anvil": {"size": 2}}]}


def test_names_and_single_texts() -> None:
    data = {"name": "a", "tools": ["hammer", {"hammer": None}, {"hammer": {"grip": "wood"}}], "favourite": "nothing", "tags": "one"}
    shop = decode(Shop, data, "shop")
    assert shop == Shop(name="a", tools=(Hammer(), Hammer(), Hammer(grip="wood")), favourite=Nothing(), tags=("one",))


def test_numbers_keep_their_type() -> None:
    shop = decode(Shop, {"name": "a", "level": 1, "either": 2}, "shop")
    assert (type(shop.level), type(shop.either)) == (float, int)
    assert type(decode(Shop, {"name": "a", "either": 2.0}, "shop").either) is float
    assert decode(Shop, {"name": "a", "either": "1e-3"}, "shop").either == "1e-3"


REFUSED = {
    "not a mapping": ([], "shop: expected a mapping with the keys name, open, count"),
    "unknown key": ({"nam": "a"}, "shop: nam: unknown key. Did you mean name?"),
    "unknown key, none near": ({"name": "a", "spare": {"zzz": 1}}, "shop: spare.zzz: unknown key. Known: grip, weight."),
    "key that is no text": ({"name": "a", 3: 1}, "shop: 3: unknown key."),
    "missing key": ({}, "shop: name: missing. It has no default: give text."),
    "missing key inside": ({"name": "a", "tools": [{"anvil": None}]}, "shop: tools.0.anvil.size: missing. It has no default: give a whole number."),
    "number for text": ({"name": 3}, "shop: name: expected text, got 3. Write it in quotes to make it text."),
    "bool for text": ({"name": True}, "shop: name: expected text, got true. Write it in quotes to make it text."),
    "null for text": ({"name": None}, "shop: name: expected text, got null."),
    "bool for int": ({"name": "a", "count": True}, "shop: count: expected a whole number, got true."),
    "bool for float": ({"name": "a", "spare": {"weight": False}}, "shop: spare.weight: expected a number, got false."),
    "int for bool": ({"name": "a", "open": 1}, "shop: open: expected true or false, got 1."),
    "float for int": ({"name": "a", "count": 2.0}, "shop: count: expected a whole number, got 2.0."),
    "text for int": ({"name": "a", "count": "many"}, "shop: count: expected a whole number, got 'many'."),
    "mapping for int": ({"name": "a", "count": {"a": 1}}, "shop: count: expected a whole number, got a mapping of 1."),
    "text for list": ({"name": "a", "sizes": "1"}, "shop: sizes: expected a list, got '1'."),
    "item of a list": ({"name": "a", "tags": ["x", 2]}, "shop: tags.1: expected text, got 2."),
    "optional item": ({"name": "a", "sizes": [1, None, "x"]}, "shop: sizes.2: expected a whole number or null, got 'x'."),
    "literal, near": (
        {"name": "a", "spare": {"grip": "woood"}},
        "shop: spare.grip: expected 'wood' or 'steel' or null, got 'woood'. Did you mean wood?",
    ),
    "literal, far": ({"name": "a", "spare": {"grip": "x"}}, "shop: spare.grip: expected 'wood' or 'steel' or null, got 'x'."),
    "number or literal": ({"name": "a", "level": "outo"}, "shop: level: expected a number or 'auto' or 'off', got 'outo'. Did you mean auto?"),
    "nan": ({"name": "a", "level": math.nan}, "shop: level: expected a finite number, got nan."),
    "text that only reports have for it": ({"name": "a", "spare": {"weight": "NaN"}}, "shop: spare.weight: expected a number, got 'NaN'."),
    "infinite": ({"name": "a", "level": -math.inf}, "shop: level: expected a finite number, got -inf."),
    "beyond float": ({"name": "a", "level": 10**400}, "shop: level: expected a finite number, got 1000"),
    "unknown name": ({"name": "a", "tools": ["hamer"]}, "shop: tools.0: unknown name 'hamer'. Did you mean hammer?"),
    "unknown name in a mapping": ({"name": "a", "tools": [{"saw": {}}]}, "shop: tools.0: unknown name 'saw'. Known: anvil, hammer, nothing."),
    "two names": (
        {"name": "a", "favourite": {"hammer": {}, "anvil": {}}},
        "shop: favourite: takes exactly one of hammer, anvil, nothing, got hammer and anvil.",
    ),
    "no name": ({"name": "a", "favourite": {}}, "shop: favourite: takes exactly one of hammer, anvil, nothing, got an empty mapping."),
    "settings of a wrong type": (
        {"name": "a", "tools": [{"hammer": []}]},
        "shop: tools.0.hammer: expected a mapping with the keys weight, grip, got a list of 0.",
    ),
    "refused by the class": ({"name": "a", "spare": {"weight": -1}}, "shop: spare: hammer.weight is -1.0, but nothing"),
    "long value": ({"name": "a", "count": "x" * 99}, f"shop: count: expected a whole number, got '{'x' * 56}...."),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(data: object, message: str) -> None:
    with pytest.raises(PlanishError) as caught:
        decode(Shop, data, "shop")
    assert str(caught.value).startswith(message)


def test_annotation_without_a_plain_form_is_the_programmers_error() -> None:
    @dataclass(frozen=True)
    class Odd:
        when: complex

    with pytest.raises(TypeError, match="complex"):
        decode(Odd, {"when": 1}, "odd")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "1.e-3", ".1e-2", "0.001", "1.0e-03"])
def test_exponents_are_numbers(text: str) -> None:
    assert parse_yaml(text, "x") == 1e-3


@pytest.mark.parametrize(
    "value", ["1e-3", "1.5e3", "2024-01-01", "yes", "null", "~", "0x10", "1:30", "=", "<<", "*.down", "", " ", "a\nb", "é", "\x85"]
)
def test_texts_that_look_like_something_else_come_back(value: str) -> None:
    assert parse_yaml(dump_yaml([value, {value: 1}]), "x") == [value, {value: 1}]


def test_dates_are_text() -> None:
    assert parse_yaml("a: 2024-13-45", "x") == {"a": "2024-13-45"}


BAD_YAML = {
    "duplicate": ("a: 1\nb: 2\na: 3", "x, line 3: duplicate key 'a'"),
    "duplicate inside": ("a:\n  b: 1\n  b: 2", "x, line 3: duplicate key 'b'"),
    "unhashable key": ("? [a]\n: 1", "x, line 1: a key must be a name"),
    "syntax": ("a: 1\nb: [1, 2", "x, line 2: "),
    "star": ("a: 1\nsites: *.down", "x, line 2: "),
    "two documents": ("a: 1\n---\nb: 1", "x, line 2: "),
    "python tag": ("a: !!python/object/apply:os.system [ls]", "x, line 1: could not determine a constructor"),
    "date tag": ("a: !!timestamp x", "x, line 1: could not determine a constructor"),
    "wrong tag": ("a: !!int x", "x: a value cannot be read"),
    "wrong bool": ("a: !!bool x", "x: a value cannot be read"),
    "control character": ("a: \x00", "x: not a text that YAML allows"),
    "deep": ("[" * 5000, "x: a value cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML.keys())
def test_bad_yaml(text: str, message: str) -> None:
    with pytest.raises(PlanishError) as caught:
        parse_yaml(text, "x")
    assert str(caught.value).startswith(message)
