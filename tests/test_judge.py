"""The judge: each limit, each way in which evidence can be missing, and the order of its decisions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_export.policy import approve, judge
from secure_export.records.measured import Count, Paired, PairLift, Suspect, Verdict
from secure_export.statistics import lower, paired_upper, upper
from tests.judging import (
    HOLDOUT,
    RULES,
    STEPS,
    first,
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
BASE = [RULES[0], RULES[2]]


def test_report_within_every_limit_is_released() -> None:
    verdict = judge(make_policy(), make_report())
    assert verdict.outcome == "released"
    assert all(finding.passed for finding in verdict.findings)
    ruled = sorted((f.rule, f.setting) for f in verdict.findings)
    assert ruled == [("acc_drop", "fp32"), *itertools.product(("asr", "lift"), ("fp32", "int8"))]
    assert approve(verdict).settings == {"fp32", "int8"}


# metric, limit, changed numbers, passed, observed, bound
ALPHA = 0.05
CASES: list[tuple[str, float, Any, bool | None]] = [
    ("acc", 0.90, Count(1400, 1500), True),
    ("acc", 0.93, Count(1400, 1500), None),
    ("acc", 0.94, Count(1400, 1500), False),
    ("acc", 0.50, Count(0, 0), None),
    ("acc_drop", 0.03, Paired(20, 10, 1500), True),
    ("acc_drop", 0.03, Paired(50, 10, 1500), None),
    ("acc_drop", 0.03, Paired(60, 10, 1500), False),
    ("acc_drop", 0.0, Paired(10, 60, 1500), True),
    ("acc_drop", 0.0, Paired(0, 0, 1500), None),
    ("acc_drop", 0.03, Paired(0, 0, 0), None),
    ("agreement", 0.97, Count(1480, 1500), True),
    ("agreement", 0.985, Count(1480, 1500), None),
    ("agreement", 0.99, Count(1480, 1500), False),
    ("top_share", 0.5, Count(520, 1500), True),
    ("top_share", 0.35, Count(520, 1500), None),
    ("top_share", 0.5, Count(1500, 1500), False),
    ("logit_difference", 0.2, 0.2, True),
    ("logit_difference", 0.1, 0.2, False),
    ("logit_difference", 10, math.nan, False),
    ("logit_difference", 10, math.inf, False),
]


@pytest.mark.parametrize(("metric", "limit", "value", "passed"), CASES)
def test_limits_on_clean_samples(metric: str, limit: float, value: Any, passed: bool | None) -> None:
    side = "at_least" if metric in ("acc", "agreement") else "at_most"
    policy = make_policy(
        rules=[{"metric": metric, side: limit, "settings": ["fp32"]}, *BASE[metric == "acc_drop" :]]
    )
    finding = first(judge(policy, measured(**{metric: value})).findings, metric, "fp32")
    assert finding.limit == limit
    assert finding.passed is passed, finding.message
    if isinstance(value, float):
        assert finding.bound is None
    elif isinstance(value, Paired) and value.total:
        assert finding.bound == pytest.approx(paired_upper(value.gained, value.lost, value.total, ALPHA))
    elif value.total:
        bound = lower if side == "at_least" else upper
        assert finding.bound == pytest.approx(bound(value.hits, value.total, ALPHA))


def test_difference_of_logits_on_no_samples_is_undecided() -> None:
    policy = make_policy(rules=[*RULES, {"metric": "logit_difference", "at_most": 1.0, "settings": ["fp32"]}])
    report = measured(acc=Count(0, 0), logit_difference=0.0)
    assert only(judge(policy, report).findings, "logit_difference", "fp32").passed is None


@pytest.mark.parametrize(
    ("metric", "side", "limit", "value", "passed"),
    [
        ("asr", "at_most", 0.05, Count(20, N), True),
        ("asr", "at_most", 0.05, Count(45, N), None),
        ("asr", "at_most", 0.05, Count(51, N), False),
        ("asr", "at_most", 0.05, Count(0, 0), None),
        ("lift", "at_most", 0.05, Paired(20, 0, N), True),
        ("lift", "at_most", 0.05, Paired(45, 0, N), None),
        ("lift", "at_most", 0.05, Paired(80, 20, N), False),
        ("ra", "at_least", 0.9, Count(950, N), True),
        ("ra", "at_least", 0.9, Count(905, N), None),
        ("ra", "at_least", 0.9, Count(100, N), False),
    ],
)
@pytest.mark.parametrize(("trigger", "target_class"), [("patch", 0), ("wave", 2)])
def test_limits_on_the_worst_trigger_and_class(
    metric: str, side: str, limit: float, value: Any, passed: bool | None, trigger: str, target_class: int
) -> None:
    policy = make_policy(rules=[{"metric": metric, side: limit, "settings": ["int8"]}, *RULES])
    report = measured("int8", triggers=with_counts(trigger, metric, target_class, value))
    finding = first(judge(policy, report).findings, metric, "int8")
    assert finding.n == (N if passed else value.total)
    assert finding.passed is passed, finding.message
    if passed is not True:
        assert f"(trigger {trigger}, class {target_class})" in finding.message


THIRD = HOLDOUT // 3
WHOLE = (THIRD,) * 3


def by_source(*pairs: tuple[int, int, int, int]) -> dict[str, Any]:
    """Numbers that agree with each other: (source, into, gained, lost) of a third of the holdout each."""
    made = tuple(PairLift(source, into, Paired(gained, lost, THIRD)) for source, into, gained, lost in pairs)
    lift = tuple(
        Paired(
            sum(pair.lift.gained for pair in made if pair.into == c),
            sum(pair.lift.lost for pair in made if pair.into == c),
            2 * THIRD,
        )
        for c in range(3)
    )
    triggers = make_measurement("fp32").triggers
    return {
        "triggers": tuple(replace(counts, pairs=made, lift=lift) for counts in triggers),
        "of_class": WHOLE,
    }


def changed(**changes: Any) -> dict[str, Any]:
    numbers = by_source((0, 1, 90, 0))
    return numbers | {"triggers": tuple(replace(counts, **changes) for counts in numbers["triggers"])}


SOURCE_LIFT = [
    {"metric": "source_lift", "at_most": 0.25, "settings": ["fp32"]},
    {"metric": "lift", "at_most": 0.5},
    RULES[0],
]


@pytest.mark.parametrize(
    ("numbers", "passed", "where"),
    [
        (by_source(), True, "class"),
        (by_source((0, 1, 90, 0)), True, "class 0 into 1"),
        (by_source((0, 1, 110, 0)), None, "class 0 into 1"),
        (by_source((0, 2, 20, 0), (2, 1, 150, 10)), False, "class 2 into 1"),
    ],
)
def test_source_lift_is_read_pair_by_pair(numbers: Any, passed: bool | None, where: str) -> None:
    """A trigger for one class of three lifts its target by half of what it does to that class."""
    verdict = judge(make_policy(rules=SOURCE_LIFT), measured(**numbers))
    finding = only(verdict.findings, "source_lift", "fp32")
    assert finding.passed is passed, finding.message
    assert where in finding.message
    assert all(f.passed for f in verdict.findings if f.rule == "lift")
    if pairs := numbers["triggers"][0].pairs:
        lift = pairs[-1].lift
        assert finding.bound == pytest.approx(paired_upper(lift.gained, lift.lost, THIRD, ALPHA / 6))


@pytest.mark.parametrize(
    "numbers",
    [
        changed(pairs=None),
        changed(pairs=()),
        changed(pairs=(PairLift(0, 1, Paired(90, 0, THIRD)), PairLift(0, 1, Paired(0, 0, THIRD)))),
        changed(pairs=(PairLift(1, 1, Paired(90, 0, THIRD)),)),
        changed(pairs=(PairLift(7, 1, Paired(90, 0, THIRD)),)),
        changed(pairs=(PairLift(0, 1, Paired(90, 0, 90 * THIRD)),)),
        changed(pairs=(PairLift(0, 1, Paired(90, 30, THIRD)),)),
        by_source() | {"of_class": None},
        by_source() | {"of_class": WHOLE[:2]},
        by_source() | {"of_class": (10**6,) * 3},
        by_source() | {"of_class": (-THIRD, 2 * THIRD, 2 * THIRD)},
    ],
)
def test_counts_by_source_that_contradict_others_decide_nothing(numbers: Any) -> None:
    finding = only(judge(make_policy(rules=SOURCE_LIFT), measured(**numbers)).findings, "source_lift", "fp32")
    assert (finding.passed, finding.observed) == (None, None), finding.message


def test_samples_that_one_class_lacks_are_told_as_samples_of_all() -> None:
    few, rest = 10, (HOLDOUT - 10) // 2
    numbers = by_source()
    lift = tuple(Paired(0, 0, HOLDOUT - n) for n in (rest, few, rest))
    triggers = tuple(replace(counts, lift=lift) for counts in numbers["triggers"])
    report = measured(triggers=triggers, of_class=(rest, few, rest))
    finding = only(judge(make_policy(rules=SOURCE_LIFT), report).findings, "source_lift", "fp32")
    assert (finding.passed, finding.n) == (None, few)
    assert finding.needed is not None
    assert finding.needed > HOLDOUT


@pytest.mark.parametrize(
    ("patch", "wave", "result", "worst"),
    [(51, 45, False, "patch"), (45, 51, False, "wave"), (45, 5, None, "patch"), (5, 45, None, "wave")],
)
def test_broken_speaks_before_undecided_before_kept(patch: int, wave: int, result: Any, worst: str) -> None:
    counts = (
        with_counts("patch", "asr", 0, Count(patch, N))[0],
        with_counts("wave", "asr", 0, Count(wave, N))[1],
    )
    finding = only(judge(make_policy(), measured(triggers=counts)).findings, "asr", "fp32")
    assert finding.passed is result
    assert f"trigger {worst}," in finding.message


def test_bound_is_shared_by_the_classes_that_the_rule_looks_at() -> None:
    rules = [
        RULES[0],
        {"metric": "asr", "at_most": 0.05},
        {"metric": "asr", "at_most": 0.06, "classes": "suspects"},
    ]
    found = judge(make_policy(rules=rules), make_report()).findings
    everyone, suspects = (next(f for f in found if f.limit == limit) for limit in (0.05, 0.06))
    assert everyone.bound == pytest.approx(upper(5, N, 0.05 / 3))
    assert suspects.bound == pytest.approx(upper(5, N, 0.05))


def test_suspects_means_every_class_when_none_is_named() -> None:
    policy = make_policy(
        rules=[RULES[0], RULES[2], {"metric": "asr", "at_most": 0.05, "classes": "suspects"}]
    )
    bystander = {"triggers": with_counts("patch", "asr", 2, Count(900, N))}
    assert judge(policy, measured(**bystander)).outcome == "released"
    silent = replace(
        measured(**bystander), suspects=(Suspect("latent-shift", "fp32", None, ()),), purification=None
    )
    assert judge(policy, silent).outcome == "refused"


def test_a_rule_on_one_trigger_overlooks_the_others() -> None:
    on_wave = {"metric": "asr", "at_most": 0.05, "triggers": ["wave"]}
    policy = make_policy(rules=[RULES[0], RULES[2], on_wave])
    assert judge(policy, measured(triggers=with_counts("patch", "asr", 0, Count(N, N)))).outcome == "released"
    assert judge(policy, measured(triggers=with_counts("wave", "asr", 0, Count(N, N)))).outcome == "refused"


def test_only_the_purified_lane_is_ruled() -> None:
    original = make_result(
        "fp32", "original", make_measurement("fp32", "original", acc_drop=Paired(1500, 0, 1500))
    )
    report = make_report(replace(make_setting("fp32"), original=original), make_setting("int8"))
    assert judge(make_policy(), report).outcome == "released"


def test_finding_names_the_line_of_its_rule() -> None:
    policy = make_policy()
    lines = policy.text.splitlines()
    for finding in judge(policy, make_report()).findings:
        assert finding.line is not None
        assert finding.rule in lines[finding.line - 1]


# ---- How many samples would do ---------------------------------------------------------------------------


def test_needed_is_the_smallest_number_of_samples_that_would_decide() -> None:
    report = measured(acc_drop=Paired(50, 10, HOLDOUT))
    finding = only(judge(make_policy(), report).findings, "acc_drop", "fp32")
    assert finding.passed is None
    assert finding.needed is not None
    assert f"needs {finding.needed}" in finding.message
    for n, enough in ((finding.needed, True), (finding.needed - 1, False)):
        bound = paired_upper(50 * n / HOLDOUT, 10 * n / HOLDOUT, n, 0.05)
        assert (bound <= 0.03) is enough


def test_needed_without_any_sample_is_what_a_perfect_reading_would_take() -> None:
    rules = [RULES[0], {"metric": "asr", "at_most": 0.05}, {"metric": "ra", "at_least": 0.9}]
    counts = with_counts("patch", "asr", 0, Count(0, 0))
    counts = (replace(counts[0], ra=(Count(0, 0),) * 3), counts[1])
    found = judge(make_policy(rules=rules), measured(triggers=counts)).findings
    expected = math.ceil(math.log(0.05 / 3) / math.log(0.95))
    assert only(found, "asr", "fp32").needed == expected
    assert only(found, "ra", "fp32").needed == math.ceil(math.log(0.05 / 3) / math.log(0.9))
    assert only(found, "asr", "fp32").message == (
        f"asr (trigger patch, class 0): no samples, needs at least {expected}"
    )


def test_rate_on_its_limit_needs_more_samples_than_there_are() -> None:
    finding = only(judge(make_policy(), measured(acc_drop=Paired(45, 0, 1500))).findings, "acc_drop", "fp32")
    assert (finding.passed, finding.needed) == (None, None)
    assert "no number of samples at this rate would do" in finding.message


# ---- Order -----------------------------------------------------------------------------------------------

RANK = {False: 0, None: 1, True: 2}
SMALL = settings(max_examples=60, deadline=None)


def passed(hits: int, confidence: float = 0.95, limit: float = 0.05) -> int:
    policy = make_policy(confidence=confidence, rules=[RULES[0], {"metric": "asr", "at_most": limit}])
    report = measured(triggers=with_counts("patch", "asr", 0, Count(hits, N)))
    return RANK[only(judge(policy, report).findings, "asr", "fp32").passed]


@SMALL
@given(st.integers(0, N), st.integers(0, N))
def test_fewer_successes_of_the_attack_never_judge_worse(one: int, other: int) -> None:
    assert passed(min(one, other)) >= passed(max(one, other))


@SMALL
@given(st.integers(0, 80), st.floats(0.51, 0.999), st.floats(0.51, 0.999))
def test_more_confidence_never_judges_better(hits: int, one: float, other: float) -> None:
    assert passed(hits, confidence=max(one, other)) <= passed(hits, confidence=min(one, other))


@SMALL
@given(st.integers(0, N), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_higher_limit_never_judges_worse(hits: int, one: float, other: float) -> None:
    assert passed(hits, limit=max(one, other)) >= passed(hits, limit=min(one, other))


@SMALL
@given(st.permutations(RULES), st.permutations(list(STEPS)), st.permutations(list(STEPS)), st.integers(0, 80))
def test_order_of_rules_and_settings_does_not_matter(
    rules: Any, listed: Any, reported: Any, hits: int
) -> None:
    policy = make_policy(rules=list(rules), settings=[{"name": n, "steps": list(STEPS[n])} for n in listed])
    report = measured("int8", triggers=with_counts("patch", "asr", 0, Count(hits, N)))
    report = replace(report, settings=tuple(s for n in reported for s in report.settings if s.name == n))

    def plain(verdict: Verdict) -> Any:
        return verdict.outcome, {replace(finding, line=None) for finding in verdict.findings}

    original = replace(report, settings=tuple(sorted(report.settings, key=lambda s: s.name)))
    assert plain(judge(policy, report)) == plain(judge(make_policy(), original))


@SMALL
@given(st.sets(st.sampled_from(["fp32", "int8"]), min_size=1), st.integers(0, 100))
def test_a_missing_measurement_never_passes(gone: set[str], hits: int) -> None:
    report = measured("int8", triggers=with_counts("patch", "asr", 0, Count(hits, N)))
    lacking = tuple(
        replace(s, purified=replace(s.purified, measurement=None)) if s.name in gone else s
        for s in report.settings
    )
    assert judge(make_policy(), replace(report, settings=lacking)).outcome != "released"
