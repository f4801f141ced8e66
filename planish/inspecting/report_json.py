"""Reports of `planish inspect` as JSON: to it, from it, and the schema of it. How: common/schemas.py."""

from typing import Any

from ..calib.outliers.diagnosis import OutlierReport
from ..common.decode import decode
from ..common.schemas import plain, schema_of


def to_dict(report: OutlierReport) -> dict[str, Any]:
    """The report as plain values, for JSON: `from_dict(to_dict(report)) == report`, and `schema()` describes it."""
    return plain(report)


def from_dict(data: object, root: str = "report") -> OutlierReport:
    """The report that plain values describe. root: the document's name, with which every error begins.

    Raises PlanishError with place, value and rule: unknown, missing or mistyped keys.
    """
    return decode(OutlierReport, data, root, nonfinite=True)


def schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of what `to_dict` gives. Descriptions are the dataclasses' docstrings."""
    return schema_of(OutlierReport, "planish inspect")
