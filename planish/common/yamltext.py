"""YAML text to plain data and back. Two traps of PyYAML are closed: duplicate keys are errors, and 1e-3 is a number as in YAML 1.2."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from ..quant.errors import PlanishError

_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")

_SIGNS = ("alias", "anchor", "the tag", "block scalar", "'@' that cannot start", "'`' that cannot start", "'%' that cannot start")
"""Of PyYAML's words where a sign that means something to YAML stands at the beginning of a value."""


class _Loader(yaml.SafeLoader):
    """Only the types of JSON: a date is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that _Loader would read as something else, and what is not printable: PyYAML writes U+0085 bare, and reads a blank."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TAGS}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag in _TAGS] for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _text)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, root: str) -> object:
    """The plain data of a YAML (or JSON) document. root: its name in errors. Raises PlanishError with the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        signs = any(words in f"{error.context} {error.problem}" for words in _SIGNS)
        hint = " A text that begins with a sign such as * stands in quotes." if signs else ""
        raise PlanishError(f"{root}{line}: {error.problem or error.context}.{hint}") from error
    except yaml.YAMLError as error:
        raise PlanishError(f"{root}: not a text that YAML allows: {error}.") from error
    except (ValueError, KeyError, RecursionError) as error:  # explicit tags on values that are none, such as `!!int x`, and absurd nesting
        raise PlanishError(f"{root}: a value cannot be read: {error}.") from error


def dump_yaml(data: object) -> str:
    """The YAML of plain data, in its own order; `parse_yaml` gives it back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
    return text
