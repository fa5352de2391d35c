"""report.json: records.Report as JSON, field by field, and back again without losing or guessing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from secure_export.errors import IntegrityError, PolicyError
from secure_export.records.reported import Report

SCHEMA = 1
"""The only `schema` number that this version writes and reads."""
LONGEST_INTEGER = 20
"""Digits, of 64 bits and a sign."""
FORMATS = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
"""What a report's files are called, in a run directory and in a release; the first is this one."""


class _Envelope(BaseModel):
    """Carries the strictness to the dataclasses inside: pydantic hands a model's config down to them.

    A NaN stays NaN (the spelling of Python's json), for a report that turned it into null would not load.
    """

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    report: Report


def dump_report(report: Report) -> str:
    """The text of report.json."""
    # No warnings: an epoch's number is an int in a field of floats, and comes back as a float.
    data = _Envelope(report=report).model_dump(mode="json", warnings=False)["report"]
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def load_report(path: Path) -> Report:
    """The report whose text dump_report() made.

    Raises:
        PolicyError: no such file, or a schema number that this version does not read.
        IntegrityError: not JSON, or not exactly the fields and types of that schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: no UTF-8 text (byte {error.start})") from error
    return parse_report(text, str(path))


def parse_report(text: str, name: str = "report.json") -> Report:
    """As load_report(), from the text of a report."""
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name}: no report: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        raise PolicyError(
            f"{name}: got schema {schema!r}, expected {SCHEMA}",
            hint="use the version of secure-export that wrote it",
        )
    try:
        return _Envelope.model_validate_json(json.dumps({"report": data})).report
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
        raise IntegrityError("\n".join(f"{name}: {line}" for line in lines)) from error


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of report.json."""
    definitions = _Envelope.model_json_schema(mode="validation")["$defs"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "secure-export report",
        "$ref": "#/$defs/Report",
        "$defs": definitions,
    }


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits, expected {LONGEST_INTEGER} at most")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return found
