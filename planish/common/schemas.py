"""Reports as JSON, led by their own dataclasses: numbers that JSON lacks, and the JSON Schema of a class.

A number that JSON lacks is one of the texts NaN, Infinity and -Infinity.
"""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .decode import NONFINITE, encode

_SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": list(NONFINITE)}]},
    NoneType: {"type": "null"},
}


def plain(report: object) -> dict[str, Any]:
    """A dataclass object as plain values, for JSON: `decode(type(report), plain(report), ..., nonfinite=True) == report`."""
    found: dict[str, Any] = _spelled(encode(report))
    return found


def to_json(report: object) -> str:
    """A dataclass object, or plain values, as indented JSON."""
    return json.dumps(_spelled(report) if isinstance(report, dict) else plain(report), indent=2, allow_nan=False)


def _spelled(value: Any) -> Any:
    """The same with texts for the numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, number in NONFINITE.items() if number == value or (math.isnan(number) and math.isnan(value)))
    return value


def schema_of(kind: type, title: str) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of what `plain` makes of such an object. Descriptions are the dataclasses' docstrings."""
    definitions: dict[str, Any] = {}
    reference = _schema(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **reference, "$defs": dict(sorted(definitions.items()))}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one annotation. Dataclasses are added to the definitions, and referred to."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(arm, definitions) for arm in arguments]}
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema(item, definitions) for item in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (Mapping, dict):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if not is_dataclass(kind):
        raise TypeError(f"no schema for annotation {kind}")
    name = getattr(kind, "__name__")  # noqa: B009 - mypy takes a dataclass found by is_dataclass for an object of it
    if name not in definitions:
        definitions[name] = {}  # named before its fields are looked at, so that a class may hold itself
        definitions[name].update(_object(kind, definitions))
    return {"$ref": f"#/$defs/{name}"}


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    properties = {item.name: _schema(hints[item.name], definitions) for item in fields(kind)}
    return {
        "description": " ".join((inspect.getdoc(kind) or "").split()),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
