"""planish.inspecting.report_json: reports go to JSON and back unchanged, the schema describes what is written, and what is no report is refused."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from helpers_inspect import bare_report, compressed_report, small, smollm2_report
from jsonschema import Draft202012Validator

from planish.calib.outliers import diagnosis
from planish.calib.outliers.diagnosis import Intervention, OutlierReport
from planish.inspecting.report_json import from_dict, schema, to_dict
from planish.quant.errors import PlanishError

REPORTS = {"demo": smollm2_report, "compressed": compressed_report, "bare": bare_report}


def with_odd_numbers() -> OutlierReport:
    """Perplexities that are not finite, and a token that is spelled like one."""
    report = smollm2_report()
    changed = [Intervention(name="zero", layer=0, quality=math.inf), Intervention(name="minus", layer=0, quality=-math.inf)]
    return replace(report, interventions=(*changed, *report.interventions), massive=(replace(report.massive[0], token="NaN"),))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema())
    return Draft202012Validator(schema())


@pytest.mark.parametrize("make", [*REPORTS.values(), with_odd_numbers], ids=[*REPORTS, "odd numbers"])
def test_there_and_back(make: Any, validator: Draft202012Validator) -> None:
    report = small(make())
    text = json.dumps(to_dict(report), allow_nan=False)
    assert from_dict(json.loads(text)) == report
    assert not list(validator.iter_errors(json.loads(text)))


def test_nan_stays_nan() -> None:
    report = replace(smollm2_report(), seconds=math.nan)
    plain = to_dict(report)
    assert plain["seconds"] == "NaN"
    assert math.isnan(from_dict(plain).seconds)


def test_the_schema_explains_every_class() -> None:
    found = schema()["$defs"]
    assert set(found) == {name for name, kind in vars(diagnosis).items() if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")}
    for name, definition in found.items():
        kind = getattr(diagnosis, name)
        assert definition["description"].startswith(kind.__doc__.split("\n")[0][:40])
        assert definition["required"] == [item.name for item in fields(kind)]


WRONG = [
    (lambda data: data.pop("seconds"), "report: seconds: missing"),
    (lambda data: data.update(second=1), "report: second: unknown key. Did you mean seconds?"),
    (lambda data: data.update(blocks=30.5), "report: blocks: expected a whole number, got 30.5."),
    (lambda data: data.update(seconds="fast"), "report: seconds: expected a number, got 'fast'."),
    (lambda data: data["massive"][0].update(by_layer=[1.0, "1"]), "report: massive.0.by_layer.1: expected a number, got '1'."),
    (lambda data: data["magnitudes"][3].update(top=[1.0, 2.0]), "report: magnitudes.3.top: expected a list of 3, got one of 2."),
    (lambda data: data["sites"][0].update(errors={"w8a8": 3}), "report: sites.0.errors.w8a8: expected a mapping, got 3."),
    (lambda data: data["sites"][0].update(errors={8: {}}), "report: sites.0.errors.8: keys must be text, got 8."),
    (lambda data: data["thresholds"].update(sink_score=0.0), "report: thresholds.sink_score is 0.0, but must be positive."),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_no_report_is_refused(spoil: Any, message: str, validator: Draft202012Validator) -> None:
    data = to_dict(small(smollm2_report()))
    spoil(data)
    with pytest.raises(PlanishError) as caught:
        from_dict(data)
    assert str(caught.value).startswith(message)
    if "thresholds" not in message and "keys must" not in message:
        assert list(validator.iter_errors(data))


def test_something_else_is_refused() -> None:
    with pytest.raises(PlanishError, match=r"^file.json: expected a mapping with the keys model, .*, got a list of 1\.$"):
        from_dict([1], "file.json")
