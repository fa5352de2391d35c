"""Negative controls: each of these must be refused, and nothing may appear at the destination."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secure_export import lane, pipeline
from secure_export.digests import of_file
from secure_export.errors import IntegrityError
from secure_export.purifiers.fine_tune import FineTune
from secure_export.records.measured import Artifact
from secure_export.records.memory import Purified
from secure_export.records.reported import Report
from tests import toys
from tests.conftest import FP32, INT8, PRUNED

RunToy = Callable[..., Report]


def failed(report: Report, rule: str) -> set[str]:
    """Settings on which a rule does not hold."""
    return {f.setting for f in report.verdict.findings if f.passed is False and f.rule.startswith(rule)}


def test_clean_model_is_released_as_the_bytes_that_were_measured(run_toy: RunToy, tmp_path: Path) -> None:
    report = run_toy(toys.clean())
    assert report.verdict.outcome == "released", report.verdict
    measured = {s.purified.artifact.sha256 for s in report.settings if s.released and s.purified.artifact}
    released = {of_file(path) for path in (tmp_path / "run" / "release").glob("*.onnx")}
    assert released == measured
    assert len(released) == 2


def test_how_int8_files_were_opened_travels_with_them(run_toy: RunToy) -> None:
    plain, exact = run_toy(toys.clean()), run_toy(toys.clean(), precise_int8=True)
    assert "onnxruntime.precise" not in plain.environment
    assert exact.environment["onnxruntime.precise"] == "True"
    assert set(exact.evidence.not_shown) > set(plain.evidence.not_shown)


@pytest.mark.parametrize(
    ("model", "settings", "awake_in"),
    [
        (toys.awake, [FP32, INT8], {"fp32", "int8"}),
        (toys.awake_in_int8, [FP32, INT8], {"int8"}),
        (toys.awake_when_pruned, [FP32, PRUNED], {"pruned"}),
    ],
)
def test_planted_backdoor_is_refused_where_it_wakes(
    model: Callable[[], Any],
    settings: list[dict[str, Any]],
    awake_in: set[str],
    run_toy: RunToy,
    tmp_path: Path,
) -> None:
    report = run_toy(model(), settings=settings, release=["fp32"])
    assert report.verdict.outcome == "refused"
    assert failed(report, "lift") == awake_in
    assert not (tmp_path / "run" / "release").exists()
    assert (tmp_path / "run" / "report.json").is_file()


def test_noop_purifier_does_not_pass(
    run_toy: RunToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FineTune, "purify", lambda self, model, head, target_class, fit, **_: Purified(model.eval(), ())
    )
    report = run_toy(toys.awake(), purify={"kind": "fine-tune"})
    assert report.verdict.outcome == "refused"
    assert failed(report, "lift") == {"fp32", "int8"}
    assert not (tmp_path / "run" / "release").exists()


def test_byte_flipped_between_measure_and_release_is_refused(
    run_toy: RunToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = pipeline.judge

    def tamper_then_judge(policy: Any, report: Report) -> Any:
        artifact = report.settings[0].purified.artifact
        path = tmp_path / "run" / artifact.path if not artifact.path.is_absolute() else artifact.path
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return judge(policy, report)

    monkeypatch.setattr(pipeline, "judge", tamper_then_judge)
    with pytest.raises(IntegrityError):
        run_toy(toys.clean())
    assert not (tmp_path / "run" / "release").exists()


def test_earlier_release_is_withdrawn_when_the_next_verdict_refuses(run_toy: RunToy, tmp_path: Path) -> None:
    assert run_toy(toys.clean()).verdict.outcome == "released"
    assert run_toy(toys.awake()).verdict.outcome == "refused"
    assert not (tmp_path / "run" / "release").exists()


def test_setting_that_raises_is_no_verdict(
    run_toy: RunToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lane.make

    def fail_on_int8(lined: Any, setting: Any, bench: Any) -> Artifact:
        if setting.name == "int8":
            raise RuntimeError("toolchain fell over")
        return make(lined, setting, bench)

    monkeypatch.setattr(lane, "make", fail_on_int8)
    report = run_toy(toys.clean())
    assert report.verdict.outcome == "no_verdict"
    assert not (tmp_path / "run" / "release").exists()


def test_suspect_with_purification_off_is_refused_whatever_the_rules_say(
    run_toy: RunToy, tmp_path: Path
) -> None:
    lax = [
        {"metric": "acc_drop", "at_most": 0.99, "settings": "released"},
        {"metric": "lift", "at_most": 0.99, "settings": "all"},
    ]
    report = run_toy(toys.awake(), rules=lax)
    assert report.verdict.outcome == "refused"
    assert not (tmp_path / "run" / "release").exists()


def test_same_command_again_does_only_what_is_missing(
    run_toy: RunToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_toy(toys.clean())

    def measure_again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(lane, "measure", measure_again)
    second = run_toy(toys.clean())
    assert second.verdict == first.verdict
    assert [s.purified for s in second.settings] == [s.purified for s in first.settings]


def test_trigger_file_that_changed_is_measured_anew(run_toy: RunToy, tmp_path: Path) -> None:
    path = tmp_path / "pattern.npy"
    custom = [{"name": "mine", "kind": "custom", "additive": str(path)}]
    pattern = np.zeros((1, 8, 8), np.float32)
    np.save(path, pattern)
    assert failed(run_toy(toys.awake(), triggers=custom), "lift") == set()
    pattern[:, *toys.PATCH] = 1
    np.save(path, pattern)
    assert failed(run_toy(toys.awake(), triggers=custom), "lift") == {"fp32", "int8"}
