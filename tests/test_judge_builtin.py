"""Findings that no policy can turn off: missing evidence, steps that did nothing, suspects left in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from secure_export.policy import judge
from secure_export.records.measured import COLLAPSED, UNREAD, Change, Count, Paired, Suspect, Unmeasured
from secure_export.records.reported import Purification
from tests.judging import (
    HOLDOUT,
    RULES,
    make_measurement,
    make_policy,
    make_report,
    make_result,
    make_setting,
    measured,
    only,
    with_counts,
)

N = HOLDOUT * 2 // 3


FP32, INT8 = make_setting("fp32"), make_setting("int8")


def without(result: Any, **changes: Any) -> Any:
    """The int8 setting with something wrong in its purified lane."""
    return make_report(FP32, replace(INT8, purified=replace(result, **changes)))


PURIFIED = make_result("int8")
assert PURIFIED.artifact is not None
CHANGED_NOTHING = replace(PURIFIED.artifact, changes=(Change("ort-static-int8", 0, 21, "tensors"),))
OTHER_CHAIN = replace(INT8, steps=({"kind": "ort-static-int8", "per_channel": False},))
AGAIN = Suspect("latent-shift", "int8", 2, (0.1, 0.2, 0.9))
UNREADABLE = Suspect("latent-shift", "int8", None, (), {UNREAD: "no head in this file"})
RUIN = Suspect(
    "latent-shift", "fp32", None, (0.1, 0.2, 0.9), {COLLAPSED: True, "fit_acc": 0.1, "excess": 0.9}
)

BUILTIN: list[tuple[str, Any, str, str, bool | None, str]] = [
    (
        "unmeasured",
        without(PURIFIED, measurement=None, unmeasured=Unmeasured("purified", "int8", "failed", "why")),
        "unmeasured",
        "int8",
        None,
        "failed: why",
    ),
    ("no measurement", without(PURIFIED, measurement=None), "unmeasured", "int8", None, "no measurement"),
    ("no file", without(PURIFIED, artifact=None), "unmeasured", "int8", None, "no file"),
    (
        "unmeasured wins over numbers",
        without(PURIFIED, unmeasured=Unmeasured("purified", "int8", "interrupted")),
        "unmeasured",
        "int8",
        None,
        "interrupted",
    ),
    ("no setting", make_report(FP32), "missing", "int8", None, "0 settings"),
    ("setting twice", make_report(FP32, INT8, INT8), "missing", "int8", None, "2 settings"),
    ("other steps", make_report(FP32, OTHER_CHAIN), "missing", "int8", None, "'per_channel': False"),
    (
        "other format",
        without(PURIFIED, artifact=replace(PURIFIED.artifact, format="pt2")),
        "missing",
        "int8",
        None,
        "measured as pt2, the policy asks for onnx",
    ),
    ("wrong lane", without(make_result("int8", "original")), "mismatch", "int8", None, "original int8"),
    (
        "another's numbers",
        without(PURIFIED, measurement=make_measurement("fp32")),
        "mismatch",
        "int8",
        None,
        "purified fp32",
    ),
    (
        "another's file",
        without(PURIFIED, artifact=replace(PURIFIED.artifact, setting="fp32")),
        "mismatch",
        "int8",
        None,
        "purified fp32",
    ),
    (
        "nothing changed",
        without(PURIFIED, artifact=CHANGED_NOTHING),
        "unchanged-step",
        "int8",
        False,
        "ort-static-int8 changed 0 of 21 tensors",
    ),
    (
        "step says nothing",
        without(PURIFIED, artifact=replace(PURIFIED.artifact, changes=())),
        "unchanged-step",
        "int8",
        None,
        "1 steps, but 0 say",
    ),
    (
        "purification changed nothing",
        make_report(replace(FP32, original=FP32.purified), replace(INT8, original=INT8.purified)),
        "unchanged-purification",
        "all",
        False,
        "changed nothing",
    ),
    (
        "suspect not purified",
        make_report(suspects=(*make_report().suspects, AGAIN)),
        "suspect-not-purified",
        "int8",
        False,
        "class 2 is suspected (latent-shift on int8) and was not purified",
    ),
    (
        "purification off",
        make_report(purification=None),
        "suspect-not-purified",
        "subject, fp32",
        False,
        "class 1 is suspected",
    ),
    ("no locator", make_report(suspects=()), "no-locator", "all", None, "latent-shift did not run"),
    (
        "only the other locator",
        make_report(suspects=make_report().suspects[:1]),
        "no-locator",
        "all",
        None,
        "latent-shift did not run",
    ),
    (
        "locator could not read",
        make_report(suspects=(*make_report().suspects, UNREADABLE)),
        "no-locator",
        "int8",
        None,
        "no head in this file",
    ),
    (
        "decisive locator that took the model for a ruin",
        make_report(suspects=(*make_report().suspects[:1], RUIN)),
        "no-locator",
        "fp32",
        None,
        "names no class of a collapsed model, and takes this for one: 10% of fit right",
    ),
    (
        "other trigger of that name",
        make_report(
            evidence=replace(make_report().evidence, known_triggers=({"name": "wave", "kind": "wanet"},))
        ),
        "missing",
        "all",
        None,
        "trigger 'wave' was measured as [{'name': 'wave', 'kind': 'wanet'}]",
    ),
]


@pytest.mark.parametrize(
    ("report", "rule", "setting", "passed", "text"), [c[1:] for c in BUILTIN], ids=[c[0] for c in BUILTIN]
)
def test_no_policy_can_turn_this_off(
    report: Any, rule: str, setting: str, passed: bool | None, text: str
) -> None:
    lax = make_policy(rules=[{"metric": "acc", "at_least": 0.01}, {"metric": "lift", "at_most": 0.99}])
    verdict = judge(lax, report)
    found = [f for f in verdict.findings if (f.rule, f.setting, f.passed) == (rule, setting, passed)]
    assert any(text in finding.message for finding in found), verdict.findings
    assert verdict.outcome == ("refused" if passed is False else "no_verdict")
    assert all(finding.line is None for finding in found)


@pytest.mark.parametrize(
    ("unconfirmed", "outcome"), [("accept", "released"), ("purify", "refused"), ("refuse", "refused")]
)
def test_policy_says_what_becomes_of_an_unconfirmed_suspect(unconfirmed: str, outcome: str) -> None:
    locate = make_policy().locate.model_dump(mode="json") | {"unconfirmed": unconfirmed}
    report = make_report(suspects=(*make_report().suspects, Suspect("anti-learning", "subject", 0, ())))
    verdict = judge(make_policy(locate=locate), report)
    assert verdict.outcome == outcome
    finding = only(verdict.findings, "suspect-not-purified", "subject")
    assert finding.passed is (outcome == "released")
    assert f"unconfirmed: {unconfirmed}" in finding.message


LOCATE = make_policy().locate.model_dump(mode="json")
HASTY = [{"kind": "anti-learning", "steps": 3}, {"kind": "latent-shift"}]


@pytest.mark.parametrize(("hits", "outcome"), [(0, "no_verdict"), (100, "no_verdict"), (200, "released")])
def test_a_trigger_that_changes_nothing_shows_nothing(hits: int, outcome: str) -> None:
    """A white patch on white margins: nothing is lifted, whatever it would wake elsewhere."""
    plain = make_measurement("fp32")
    first, *others = plain.triggers
    counted = make_measurement("fp32", triggers=(replace(first, changed=Count(hits, 256)), *others))
    report = make_report(
        replace(make_setting("fp32"), purified=make_result("fp32", "purified", counted)), make_setting("int8")
    )
    verdict = judge(make_policy(), report)
    assert verdict.outcome == outcome
    assert [f.rule for f in verdict.findings if f.passed is None] == ["unchanged-trigger"] * (hits < 128)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precise_int8": True}, "measured with precise_int8 False"),
        ({"data": {"fit": 900}}, "measured with data.fit 500"),
        ({"locate": LOCATE | {"rounds": 5}}, "located in 1 rounds"),
        ({"locate": LOCATE | {"unconfirmed": "purify", "methods": HASTY}}, "located with"),
        ({"seed": 7}, ""),
    ],
)
def test_a_stored_report_answers_for_what_was_done_alone(changes: dict[str, Any], said: str) -> None:
    before = make_policy()
    report = make_report(policy_text=before.text, policy_sha256=before.sha256)
    found = [f.message for f in judge(make_policy(**changes), report).findings if f.passed is None]
    assert [message.startswith(said) for message in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "cannot be read: the policy in the report:1:"),
        ("locate: [1]", "locate is a list, expected a section"),
        ("data: 5", "data is a int, expected a section"),
        ("locate: {rounds: x}", "locate.rounds is a str, expected a number"),
        ("locate: {methods: 5}", "locate.methods is a int, expected a list"),
    ],
)
def test_a_report_whose_own_policy_is_none_is_no_verdict(text: str, said: str) -> None:
    report = make_report(policy_text=text, policy_sha256="0", policy_path="strict.yaml")
    found = [f for f in judge(make_policy(), report).findings if f.rule == "missing" and f.passed is None]
    assert len(found) == 1
    assert "the report's own policy" in found[0].message
    assert said in found[0].message


@pytest.mark.parametrize("said", [{}, {"fit_acc": "x", "excess": "y"}, {"fit_acc": True, "excess": "9"}])
def test_a_ruin_of_which_nothing_is_said_is_no_verdict(said: dict[str, Any]) -> None:
    ruin = replace(RUIN, evidence={COLLAPSED: True, **said})
    verdict = judge(make_policy(), make_report(suspects=(*make_report().suspects[:1], ruin)))
    finding = only(verdict.findings, "no-locator", "fp32")
    assert finding.passed is None
    assert "collapsed" in finding.message


def test_a_ruin_that_does_not_ship_may_stay_unjudged() -> None:
    report = make_report(suspects=(*make_report().suspects, replace(RUIN, setting="int8")))
    assert judge(make_policy(), report).outcome == "released"
    assert judge(make_policy(release=["fp32", "int8"]), report).outcome == "no_verdict"


def test_locator_that_did_not_run_confirms_nothing_under_refuse() -> None:
    locate = make_policy().locate.model_dump(mode="json") | {"unconfirmed": "refuse"}
    report = make_report(suspects=make_report().suspects[1:])
    assert only(judge(make_policy(locate=locate), report).findings, "no-locator", "all").passed is None


@pytest.mark.parametrize(
    "triggers",
    [
        (),
        make_measurement("fp32").triggers[:1],
        make_measurement("fp32").triggers + make_measurement("fp32").triggers[1:],
        tuple(replace(counts, asr=counts.asr[:2]) for counts in make_measurement("fp32").triggers),
        tuple(
            replace(counts, asr=(*counts.asr, Count(0, N))) for counts in make_measurement("fp32").triggers
        ),
        with_counts("wave", "asr", 1, Count(-1, N)),
        with_counts("wave", "asr", 1, Count(N + 1, N)),
        with_counts("wave", "lift", 1, Paired(N, 1, N)),
        with_counts("wave", "lift", 1, Paired(-5, 0, N)),
    ],
    ids=[
        "none",
        "one",
        "twice",
        "class missing",
        "class too many",
        "negative",
        "beyond",
        "both",
        "negative pair",
    ],
)
def test_missing_or_impossible_counts_are_no_verdict(triggers: Any) -> None:
    verdict = judge(make_policy(), measured(triggers=triggers))
    assert verdict.outcome == "no_verdict"
    undecided = [finding for finding in verdict.findings if finding.passed is None]
    assert all("not measured" in f.message or "impossible" in f.message for f in undecided)


def test_suspect_that_is_no_class_is_no_verdict() -> None:
    policy = make_policy(
        rules=[RULES[0], RULES[2], {"metric": "asr", "at_most": 0.05, "classes": "suspects"}]
    )
    report = make_report(purification=Purification("lmr", {}, (1, 7, -1), (), 1.0))
    assert judge(policy, report).outcome == "no_verdict"


def test_subject_without_classes_is_no_verdict() -> None:
    report = make_report(suspects=(Suspect("latent-shift", "fp32", None, ()),), purification=None)
    report = replace(report, subject=replace(report.subject, classes=0))
    assert judge(make_policy(), report).outcome == "no_verdict"
