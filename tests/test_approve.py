"""From a verdict to a permission: only findings that all passed, whatever the verdict calls itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secure_export.errors import NoVerdict, Refused
from secure_export.policy import Approved, approve, judge
from secure_export.records.measured import Finding, Paired, Verdict
from secure_export.report.schema import dump_report, load_report
from tests.judging import HOLDOUT, make_policy, measured


def finding(passed: bool | None, rule: str = "asr") -> Finding:
    return Finding(rule, "fp32", 0.1, 0.2, 0.05, 100, passed, f"{rule} is {passed}", needed=400)


@given(st.lists(st.sampled_from([True, False, None])), st.sampled_from(["released", "refused", "no_verdict"]))
def test_only_findings_that_all_passed_can_be_approved(results: list[bool | None], outcome: Any) -> None:
    verdict = Verdict(outcome, tuple(finding(result) for result in results))
    if results and all(results) and outcome == "released":
        assert approve(verdict) == Approved(verdict)
        return
    expected = Refused if False in results else NoVerdict
    for forge in (approve, Approved):
        with pytest.raises(expected) as refused:
            forge(verdict)
        assert refused.value.exit_code == (3 if expected is Refused else 4)


def test_refusal_lists_every_failed_finding_and_no_verdict_every_undecided_one() -> None:
    both = (finding(False, "asr"), finding(True, "acc"), finding(False, "lift"), finding(None, "ra"))
    with pytest.raises(Refused) as refused:
        approve(Verdict("refused", both))
    assert refused.value.message == "fp32: asr: asr is False\nfp32: lift: lift is False"
    report = measured(acc_drop=Paired(50, 10, HOLDOUT))
    with pytest.raises(NoVerdict, match=r"^fp32: acc_drop: .* = \(50 - 10\) of 1500, .* needs \d+$"):
        approve(judge(make_policy(), report))


def test_stored_report_is_judged_as_the_one_in_memory(tmp_path: Path) -> None:
    report = measured(acc_drop=Paired(50, 10, HOLDOUT))
    (tmp_path / "report.json").write_text(dump_report(report), encoding="utf-8")
    assert judge(make_policy(), load_report(tmp_path / "report.json")) == judge(make_policy(), report)
