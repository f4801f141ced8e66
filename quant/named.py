"""How a field that holds one of several classes says so, for whoever reads and writes plain data (planish/common/decode.py)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """Annotation of a field that holds one of several classes: `Annotated[A | B, Named({"a": A, "b": B})]`.

    Plain data: `a`, or `{a: {settings of A}}`.
    """

    classes: Mapping[str, type]
