"""Plain data to frozen dataclasses and back: strict, led by the classes' own type annotations.

Plain data is what YAML and JSON hold. An annotation says what is taken, and nothing else is:

| annotation             | plain data                                                         |
|------------------------|--------------------------------------------------------------------|
| str, int, float, bool  | a scalar of that type; a float also takes an int, no int a bool    |
| None, Literal[...]     | that value                                                         |
| A | B                  | whatever A or B takes; the exact type first                        |
| tuple[X, ...]          | a list; for a tuple of texts also one text alone                   |
| tuple[X, Y]            | a list of exactly these                                            |
| list[X]                | a list                                                             |
| Mapping or dict[str, X] | a mapping                                                         |
| Any                    | whatever there is                                                  |
| a dataclass            | a mapping of its fields, no others, none without a default missing |
| Annotated[A, Named(…)] | a name, or a mapping of one name to the settings of what it names  |
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from ..quant.errors import PlanishError, nearest
from ..quant.named import Named as Named

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers that JSON lacks, by the texts that stand for them where a document may hold such numbers."""

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
T = TypeVar("T")

_MAPPINGS = (Mapping, dict)
_SCALARS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


class _Place(NamedTuple):
    """Where in the data a value stands: the document, and the dotted path in it. nonfinite: whether numbers may be NaN or infinite there."""

    root: str
    path: str = ""
    nonfinite: bool = False

    def at(self, key: object) -> "_Place":
        return _Place(self.root, f"{self.path}.{key}" if self.path else str(key), self.nonfinite)

    def error(self, text: str) -> PlanishError:
        return PlanishError(": ".join(part for part in (self.root, self.path, text) if part))

    def refusal(self, error: PlanishError) -> PlanishError:
        """What a class says of itself, with the place before it; it may begin with the last name of the place."""
        name, text = self.path.rpartition(".")[2], str(error)
        return PlanishError(f"{self.root}: {self.path}{text[len(name) :]}") if text.startswith((f"{name}.", f"{name}:")) else self.error(text)


def decode(kind: type[T], data: object, root: str, *, nonfinite: bool = False) -> T:
    """The object of dataclass `kind` that plain `data` describes. root: the document's name, with which every error begins. nonfinite: a number may
    also be one of the texts of NONFINITE.

    Raises PlanishError with place, value and rule: unknown, missing or mistyped keys, and what the classes themselves refuse.
    """
    found: T = _decode(kind, data, _Place(root, nonfinite=nonfinite))
    return found


def encode(value: object, *, defaults: bool = True) -> Plain:
    """Plain data of a dataclass object: `decode(type(value), encode(value), ...) == value`. defaults: also write what equals a field's default."""
    return _encode(type(value), value, defaults)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _arms(kind: Any) -> Iterator[Any]:
    """The alternatives of a union, or the type alone."""
    if get_origin(kind) in (Union, UnionType):
        for arm in get_args(kind):
            yield from _arms(arm)
    else:
        yield kind


def _named(kind: Any) -> Named | None:
    return next((note for note in getattr(kind, "__metadata__", ()) if isinstance(note, Named)), None)


def _suits(kind: Any, data: object) -> bool:
    """Whether the data has the outer shape that the type, not a union, takes."""
    if kind is Any:
        return True
    if kind in _SCALARS:
        return type(data) is kind or (kind is float and type(data) is int)
    if _named(kind):
        return isinstance(data, (str, dict))
    if get_origin(kind) is Literal:
        return any(type(data) is type(value) and data == value for value in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(data, list) or (isinstance(data, str) and get_args(kind)[0] is str)
    if get_origin(kind) is list:
        return isinstance(data, list)
    if get_origin(kind) in _MAPPINGS or is_dataclass(kind):
        return isinstance(data, dict)
    raise TypeError(f"no plain form for annotation {kind}")


def _decode(kind: Any, data: object, place: _Place) -> Any:
    suiting = [arm for arm in _arms(kind) if _suits(arm, data)]
    if place.nonfinite and not suiting and isinstance(data, str) and data in NONFINITE and float in _arms(kind):
        return NONFINITE[data]
    if not suiting:
        raise place.error(_mismatch(kind, data))
    arm = min(suiting, key=lambda arm: arm is float)  # a whole number is an int first, where the union has both
    if named := _named(arm):
        return _decode_named(named, data, place)
    if get_origin(arm) is tuple:
        return _decode_tuple(get_args(arm), data if isinstance(data, list) else [data], place)
    if isinstance(data, list) and get_origin(arm) is list:
        return [_decode(get_args(arm)[0], item, place.at(index)) for index, item in enumerate(data)]
    if get_origin(arm) in _MAPPINGS:
        return _decode_mapping(get_args(arm)[1], data, place)
    if is_dataclass(arm):
        return _decode_fields(arm, data, place)
    return _decode_float(data, place) if arm is float else data


def _decode_tuple(kinds: tuple[Any, ...], items: list[Any], place: _Place) -> Any:
    if kinds[-1] is not Ellipsis:
        if len(items) != len(kinds):
            raise place.error(f"expected a list of {len(kinds)}, got one of {len(items)}.")
        return tuple(_decode(kind, item, place.at(index)) for index, (kind, item) in enumerate(zip(kinds, items, strict=True)))
    if kinds[0] is float and all(type(item) is float and math.isfinite(item) for item in items):
        return tuple(items)  # pictures have hundreds of thousands
    return tuple(_decode(kinds[0], item, place.at(index)) for index, item in enumerate(items))


def _decode_mapping(kind: Any, data: Any, place: _Place) -> Any:
    for key in data:
        if not isinstance(key, str):
            raise place.at(key).error(f"keys must be text, got {_show(key)}.")
    return {key: _decode(kind, item, place.at(key)) for key, item in data.items()}


def _decode_float(data: Any, place: _Place) -> float:
    if not abs(data) <= sys.float_info.max:
        raise place.error(f"expected a finite number, got {_show(data)}.")
    return float(data)


def _decode_named(named: Named, data: object, place: _Place) -> Any:
    choices: dict[Any, Any] = data if isinstance(data, dict) else {data: None}
    if len(choices) != 1:
        got = " and ".join(map(str, choices)) or "an empty mapping"
        raise place.error(f"takes exactly one of {', '.join(named.classes)}, got {got}.")
    [(name, settings)] = choices.items()
    if name not in named.classes:
        raise place.error(f"unknown name {_show(name)}. {nearest(str(name), named.classes)}")
    return _decode(named.classes[name], {} if settings is None else settings, place.at(name))


def _decode_fields(kind: Any, data: Any, place: _Place) -> Any:
    known, hints = _fields(kind), _hints(kind)
    for key in data:
        if key not in known:
            raise place.at(key).error(f"unknown key. {nearest(str(key), known)}")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise place.at(name).error(f"missing. It has no default: give {_expected(hints[name])}.")
    values = {name: _decode(hints[name], item, place.at(name)) for name, item in data.items()}
    try:
        return kind(**values)
    except PlanishError as error:
        raise place.refusal(error) from error


def _fields(kind: Any) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(kind)}


def _expected(kind: Any) -> str:
    """The type in words."""
    arms = [arm for arm in _arms(kind) if arm is not NoneType] + [arm for arm in _arms(kind) if arm is NoneType]
    return " or ".join(_expected_arm(arm) for arm in arms)


def _expected_arm(arm: Any) -> str:
    if arm in _SCALARS:
        return _SCALARS[arm]
    if named := _named(arm):
        return f"one of {', '.join(named.classes)}"
    if get_origin(arm) is Literal:
        return " or ".join(_show(value) for value in get_args(arm))
    if get_origin(arm) in _MAPPINGS:
        return "a mapping"
    return "a list" if get_origin(arm) in (tuple, list) else f"a mapping with the keys {', '.join(_fields(arm))}"


def _mismatch(kind: Any, data: object) -> str:
    text = f"expected {_expected(kind)}, got {_show(data)}."
    literals = [value for arm in _arms(kind) if get_origin(arm) is Literal for value in get_args(arm)]
    if isinstance(data, str) and literals:
        near = nearest(data, map(str, literals))
        return f"{text} {near}" if near.startswith("Did") else text
    return f"{text} Write it in quotes to make it text." if str in _arms(kind) and type(data) in _SCALARS and data is not None else text


def _show(data: object) -> str:
    """A value in a message, as YAML would have it, not too long."""
    if data is None or isinstance(data, bool):
        return "null" if data is None else str(data).lower()
    if isinstance(data, (dict, list)):
        return f"{'a mapping' if isinstance(data, dict) else 'a list'} of {len(data)}"
    text = str(data) if isinstance(data, (int, float)) else repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encode(kind: Any, value: Any, defaults: bool) -> Plain:
    for named in filter(None, map(_named, _arms(kind))):
        for name, chosen in named.classes.items():
            if chosen is type(value):
                settings = _encode(chosen, value, defaults)
                return {name: settings} if settings else name
    if isinstance(value, tuple):
        kinds = next(get_args(arm) for arm in _arms(kind) if get_origin(arm) is tuple)
        if kinds == (float, Ellipsis):
            return list(value)
        return [_encode(kinds[0 if kinds[-1] is Ellipsis else index], item, defaults) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        item_kind = next((get_args(arm)[1] for arm in _arms(kind) if get_origin(arm) in _MAPPINGS), Any)
        return {key: _encode(item_kind, item, defaults) for key, item in value.items()}
    if is_dataclass(value):
        own: Any = type(value)
        hints, known = _hints(own), _fields(value)
        return {name: _encode(hints[name], getattr(value, name), defaults) for name in known if defaults or not _is_default(known[name], value)}
    plain: Plain = value
    return plain


def _is_default(field: Field[Any], value: object) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(getattr(value, field.name) == default)
