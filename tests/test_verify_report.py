"""verify: a report that does not say of these files what its own policy, or the receiver's, makes of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from secure_export.options import overrides
from secure_export.policy import judge, parse_policy
from secure_export.records.measured import Paired, Verdict
from secure_export.records.reported import Report
from secure_export.verify import OVERRIDABLE, carried
from tests.judging import HOLDOUT, NoAliases, make_measurement, make_report
from tests.receiving import POLICY, Received, does_not_hold


@pytest.fixture
def received(tmp_path: Path) -> Received:
    return Received(tmp_path)


def test_sizes_are_those_that_were_measured(received: Received) -> None:
    received.edit_artifact("int8", size=5)
    does_not_hold(received, "int8.onnx: got", "expected 5 bytes")


def test_a_model_under_a_name_that_is_not_its_settings(received: Received) -> None:
    received.edit_artifact("int8", setting="fp32")
    does_not_hold(received, "'int8' is released without a file of its own")


def test_a_released_setting_without_a_file(received: Received) -> None:
    def without(report: Report) -> Report:
        fp32, int8 = report.settings
        return replace(report, settings=(fp32, replace(int8, purified=replace(int8.purified, artifact=None))))

    received.edit(without)
    does_not_hold(received, "'int8' is released without a file of its own")


def test_the_suffix_is_the_one_that_was_measured(received: Received) -> None:
    received.edit_artifact("int8", path=Path("work/x.pt2"))
    does_not_hold(received, "int8.onnx: report.json releases no such file")
    shutil.move(received.file("int8.onnx"), received.file("int8.pt2"))
    received.seal()
    assert received.verify().exit_code == 0


def test_a_model_in_the_place_of_a_report(received: Received) -> None:
    def renamed(report: Report) -> Report:
        fp32, int8 = report.settings
        return replace(report, settings=(fp32, replace(int8, name="report")))

    received.edit_artifact("int8", setting="report", path=Path("work/x.md"))
    received.file("int8.onnx").unlink()
    received.edit(renamed)
    does_not_hold(received, "two files of the release have one name")


def measured_as(setting: str, **numbers: Any) -> Callable[[Report], Report]:
    """The report with other counts of one setting, and everything else as it was."""

    def change(report: Report) -> Report:
        measurement = make_measurement(setting, **numbers)
        return replace(
            report,
            settings=tuple(
                replace(one, purified=replace(one.purified, measurement=measurement))
                if one.name == setting
                else one
                for one in report.settings
            ),
        )

    return change


def judged(report: Report) -> Report:
    return replace(report, verdict=judge(POLICY, report))


def test_edited_counts_under_which_the_policy_still_releases(received: Received) -> None:
    received.edit(measured_as("int8", acc_drop=Paired(1, 0, HOLDOUT)))
    does_not_hold(received, "another verdict than follows from what it counts")


def test_edited_counts_under_which_it_does_not(received: Received) -> None:
    received.edit(measured_as("int8", acc_drop=Paired(900, 0, HOLDOUT)))
    result = received.verify()
    assert result.exit_code == 3, result.output
    assert "fails: acc_drop int8" in result.output
    assert "refused: files and report agree" in result.output
    assert "\nholds" not in result.output


def test_a_refused_report_among_released_files(received: Received) -> None:
    received.edit(lambda report: judged(measured_as("int8", acc_drop=Paired(900, 0, HOLDOUT))(report)))
    assert received.verify().exit_code == 3


def test_too_few_samples_are_no_verdict(received: Received) -> None:
    received.edit(lambda report: judged(measured_as("int8", acc_drop=Paired(0, 0, 1))(report)))
    result = received.verify()
    assert result.exit_code == 4
    assert "undecided: acc_drop int8" in result.output
    assert "no verdict: files and report agree" in result.output


@pytest.mark.parametrize("outcome", ["refused", "no_verdict"])
def test_edited_verdict(outcome: Any, received: Received) -> None:
    received.edit(lambda report: replace(report, verdict=replace(report.verdict, outcome=outcome)))
    does_not_hold(received, "another verdict than follows")


@pytest.mark.parametrize("kept", [0, 1])
def test_edited_findings(kept: int, received: Received) -> None:
    received.edit(lambda report: replace(report, verdict=Verdict("released", report.verdict.findings[:kept])))
    does_not_hold(received, "another verdict than follows")


@pytest.mark.parametrize(
    "changes", [{"bound": 0.001}, {"bound": None}, {"observed": 0.0}, {"limit": 0.5}, {"message": "fine"}]
)
def test_a_finding_that_says_something_else(changes: dict[str, Any], received: Received) -> None:
    def change(report: Report) -> Report:
        first, *others = report.verdict.findings
        return replace(report, verdict=Verdict("released", (replace(first, **changes), *others)))

    assert received.original.verdict.findings[0].bound
    received.edit(change)
    does_not_hold(received, "another verdict than follows")


def test_a_bound_in_its_last_bits_is_the_same_bound(received: Received) -> None:
    def change(report: Report) -> Report:
        first, *others = report.verdict.findings
        first = replace(first, bound=(first.bound or 0) * (1 + 1e-14))
        return replace(report, verdict=Verdict("released", (first, *others)))

    received.edit(change)
    assert received.verify().exit_code == 0


def test_edited_policy_text(received: Received) -> None:
    weaker = POLICY.text.replace("at_most: 0.05", "at_most: 0.5")
    assert weaker != POLICY.text
    received.edit(lambda report: replace(report, policy_text=weaker))
    does_not_hold(received, "the policy in it has not the sha256 that stands beside it")


def test_a_policy_with_a_byte_order_mark(received: Received) -> None:
    digest = sha256("\ufeff" + POLICY.text)
    received.edit(lambda report: replace(report, policy_sha256=digest))
    assert received.verify().exit_code == 0


@pytest.mark.parametrize("key", ["rules", "release", "confidence", "locate.decisive", "subject.artifact"])
def test_no_flag_overrides_what_a_verdict_follows_from(key: str, received: Received) -> None:
    value = {"confidence": 0.51, "release": ["fp32"]}.get(key, [])
    received.edit(lambda report: replace(report, overrides={key: value}))
    does_not_hold(received, f"'{key}' is said to be overridden")


def test_what_flags_override_is_allowed_and_said(received: Received) -> None:
    flags = {
        "arch": "a:b",
        "classes": 3,
        "head": "fc",
        "holdout": 9,
        "channels": 1,
        "seed": 5,
        "no_purify": True,
    }
    flags |= {"mean": "0.5", "std": "0.5", "resize": "8x8"}
    flags |= {"model": "m", "artifact": "a", "data": "d", "holdout_data": "h"}
    assert {key.partition(".")[0] for key in overrides(flags)} == set(OVERRIDABLE)
    received.edit(lambda report: replace(report, overrides={"seed": 5}))
    result = received.verify()
    assert result.exit_code == 0, result.output
    assert "instead of its text seed: 5" in result.output


def test_a_setting_that_the_policy_does_not_release(received: Received) -> None:
    """The rules on what is released did not bind it."""
    only_fp32 = POLICY.text.replace("release:\n- fp32\n- int8\n", "release:\n- fp32\n")
    policy = parse_policy(only_fp32)

    def change(report: Report) -> Report:
        changed = replace(report, policy_text=only_fp32, policy_sha256=policy.sha256)
        return replace(changed, verdict=judge(policy, changed))

    received.edit(change)
    does_not_hold(received, "report.json releases 'fp32', 'int8', and its policy 'fp32'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", "got schema None"),
        (b'{"schema": 99}', "got schema 99"),
        (b"[" * 100_000, "no report"),
        (b"not JSON", "no report"),
        (b"\xff{}", "no UTF-8"),
        (b'{"schema": 1, "schema": 1}', "duplicate key"),
    ],
)
def test_a_report_that_is_none(text: bytes, words: str, received: Received) -> None:
    received.file("report.json").write_bytes(text)
    received.seal()
    does_not_hold(received, words)


@pytest.mark.parametrize(
    "text",
    ["", "version: 2\n", "a: [\n", POLICY.text + "#" * 1_000_000],
    ids=["none", "other", "cut", "long"],
)
def test_a_policy_that_cannot_be_used_is_not_the_receivers_fault(text: str, received: Received) -> None:
    received.edit(lambda report: replace(report, policy_text=text, policy_sha256=sha256(text)))
    does_not_hold(received, "report.json")


def test_the_policy_for_a_file_of_another_tool_names_paths_that_no_report_has() -> None:
    """Without them no setting is called `artifact`, and agreement has nothing to compare with."""
    limits: dict[str, Any] = {
        "acc": {"at_least": 0.5},
        "agreement": {"at_least": 0.5},
        "lift": {"at_most": 0.5},
    }
    rules = [{"metric": metric, "settings": ["artifact"], **limit} for metric, limit in limits.items()]
    text = yaml.dump({**yaml.safe_load(POLICY.text), "rules": rules}, Dumper=NoAliases, sort_keys=False)
    report = make_report(policy_text=text, policy_sha256=sha256(text))
    report = replace(report, subject=replace(report.subject, architecture="artifact"))
    assert [setting.name for setting in carried(report).expanded_settings()] == ["artifact"]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_what_a_report_says_cannot_steer_a_terminal(received: Received) -> None:
    received.edit(lambda report: replace(report, policy_path="\x1b[2J\nok: x"))
    result = received.verify()
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\nok: x" not in result.output


# ---- The receiver's own policy ---------------------------------------------------------------------------


def own(received: Received, **changes: Any) -> str:
    path = received.folder.with_name("own.yaml")
    sections = {**yaml.safe_load(POLICY.text), **changes}
    path.write_text(yaml.dump(sections, Dumper=NoAliases, sort_keys=False))
    return str(path)


def test_a_stricter_policy_of_the_receiver_refuses(received: Received) -> None:
    rules = [
        {"metric": "acc_drop", "at_most": 0.001, "settings": "released"},
        {"metric": "lift", "at_most": 0.05},
    ]
    policy = own(received, rules=rules)
    result = received.verify("--policy", policy)
    assert result.exit_code == 3, result.output
    assert "fails: acc_drop" in result.output
    assert f"judged again by yours: {policy}" in result.output
    assert received.verify("--policy", own(received)).exit_code == 0


def test_the_receivers_rules_bind_what_ships(received: Received) -> None:
    does_not_hold(received, "'int8' ships", flags=("--policy", own(received, release=["fp32"])))


def test_a_policy_of_the_receiver_does_not_excuse_the_reports_own(received: Received) -> None:
    received.edit(measured_as("int8", acc_drop=Paired(900, 0, HOLDOUT)))
    lax = [{"metric": "acc", "at_least": 0.1, "settings": "released"}, {"metric": "lift", "at_most": 0.05}]
    assert received.verify("--policy", own(received, rules=lax)).exit_code == 3


def test_a_policy_that_cannot_be_used_is_usage(received: Received) -> None:
    does_not_hold(received, "nosuch", flags=("--policy", "nosuch"), code=2)
