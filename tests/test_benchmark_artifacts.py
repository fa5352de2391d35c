"""The table of every format: rows of several environments side by side, none of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import artifacts, artifacts_table

ABOUT = {"card": {"sha256": "aa", "target_class": 1}}
ROW = {
    "acc": [3, 4],
    "agreement": [4, 4],
    "logit_difference": 0.5,
    "asr": {"own": [[0, 3], [2, 3]]},
    "bytes": 2000,
}
ABSENT = {"unmeasured": "PolicyError: litert: litert_torch is not installed"}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifacts, "RESULTS", tmp_path / "artifacts.json")
    return tmp_path / "artifacts.json"


def wanted(missing: bool = True, only: tuple[str, ...] = ("fp32",), about: Any = ABOUT) -> list[str]:
    return list(artifacts.begun("qcb", about, only, missing).settings)


def test_what_another_environment_measured_stays() -> None:
    everything = wanted()
    artifacts.store("qcb", "settings", "fp32 tflite", ABSENT)
    assert wanted() == everything, "a row for want of an extra is still missing"
    artifacts.store("qcb", "settings", "fp32 tflite", ROW)
    artifacts.store("qcb", "settings", "fp32 tflite", ABSENT)
    assert "fp32 tflite" not in wanted()
    assert "fp32 tflite" in wanted(missing=False)
    assert "fp32 tflite" in wanted(about={"card": {"sha256": "bb", "target_class": 1}}), "another model now"


def test_drawn_rows_say_what_is_missing_and_why(results: Path) -> None:
    wanted()
    artifacts.store("qcb", "settings", "fp32 onnx", ROW)
    artifacts.store("qcb", "settings", "fp32 tflite", {"unmeasured": "a | b. More."})
    lines = artifacts_table.drawn(json.loads(results.read_text())["models"]).splitlines()
    assert "| fp32 onnx | 75 % (3 of 4) | 67 % (2 of 3) | 100 % (4 of 4) | 0.5 | 2 |" in lines
    assert "| fp32 tflite | not made: a / b | – | – | – | – |" in lines
    why = "cannot export to ONNX: Error when translating node %x : [target=torch.ops.aten._int_mm.default](a"
    assert artifacts_table.why({"unmeasured": why}) == "not made: torch cannot export `aten._int_mm`"
    assert "| fp32 pt2 | not tried | – | – | – | – |" in lines
