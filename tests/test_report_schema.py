"""report.json: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from secure_export.errors import IntegrityError, PolicyError
from secure_export.records.reported import Purification, Report
from secure_export.report.schema import SCHEMA, dump_report, json_schema, load_report, parse_report
from tests.judging import make_report, measured
from tests.report_sample import sample_report


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        sample_report(),
        measured(logit_difference=math.inf),
        make_report(
            purification=Purification("lmr", {"lr": 0.1, "on": True}, (1,), ({"phase": "x", "l": 0.5},), 1.0)
        ),
    ],
    ids=["small", "sample", "infinite", "history"],
)
def test_report_comes_back_as_it_was(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(dump_report(report), encoding="utf-8")
    assert load_report(path) == report


def test_nan_stays_nan() -> None:
    back = parse_report(dump_report(measured(logit_difference=math.nan)))
    measurement = back.settings[0].purified.measurement
    assert measurement is not None
    assert math.isnan(measurement.logit_difference)


def stored(**changes: Any) -> dict[str, Any]:
    return {**json.loads(dump_report(make_report())), **changes}


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, [1]])
def test_other_schema_number_is_refused_with_a_hint(schema: Any) -> None:
    with pytest.raises(PolicyError, match="expected 1") as refused:
        parse_report(json.dumps(stored(schema=schema)))
    assert "version of secure-export" in refused.value.hint


def test_schema_number_is_needed() -> None:
    for text in ("[]", "{}", "3", "null"):
        with pytest.raises(PolicyError, match="got schema None, expected 1"):
            parse_report(text)


def acc(data: dict[str, Any]) -> Any:
    return data["settings"][0]["purified"]["measurement"]["acc"]


def lift(data: dict[str, Any]) -> Any:
    return data["settings"][0]["purified"]["measurement"]["triggers"][0]["lift"][0]


def broken(change: Any) -> str:
    data = stored()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(note="x"), "note: Unexpected keyword argument"),
        (lambda d: d["subject"].update(x=1), "subject.x: Unexpected keyword argument"),
        (
            lambda d: acc(d).update(x=1),
            "measurement.acc.x: Unexpected",
        ),
        (lambda d: d.pop("settings"), "settings: Field required"),
        (
            lambda d: acc(d).update(hits="5"),
            "acc.hits: Input should be",
        ),
        (
            lambda d: acc(d).update(hits=5.5),
            "acc.hits: Input should be",
        ),
        (lambda d: acc(d).update(total=2**53), "acc.total: Input should be less than"),
        (lambda d: lift(d).update(gained=2**60), "lift.0.gained: Input should be less than"),
        (lambda d: d["subject"].update(classes=10**12), "subject.classes: Input should be less than"),
        (lambda d: d["subject"].update(parameters=10**400), "an integer of 401 digits"),
        (
            lambda d: d["settings"][0].update(released="yes"),
            "settings.0.released: Input should be a valid boolean",
        ),
        (lambda d: d["verdict"].update(outcome="passed"), "verdict.outcome: Input should be 'released'"),
    ],
)
def test_other_fields_and_types_are_refused(change: Any, message: str) -> None:
    with pytest.raises(IntegrityError) as refused:
        parse_report(broken(change), "r.json")
    assert refused.value.message.startswith("r.json: ")
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"schema": 1', "Expecting"),
        ('{"schema": 1, "schema": 1}', "duplicate key 'schema'"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["empty", "truncated", "duplicate", "deep"],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        parse_report(text)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load_report(tmp_path / "report.json")
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    with pytest.raises(IntegrityError, match="no UTF-8 text"):
        load_report(tmp_path / "latin.json")


def test_published_schema_is_strict_about_every_record() -> None:
    schema = json_schema()
    assert schema["$ref"] == "#/$defs/Report"
    assert all(
        definition["additionalProperties"] is False
        for definition in schema["$defs"].values()
        if definition["type"] == "object"
    )
    later = {"costs", "disagreements", "overrides"}  # what reports of the first release did not have
    assert set(schema["$defs"]["Report"]["required"]) == set(stored()) - later
    assert SCHEMA == 1
