"""Rules on searches: what was not searched cannot pass, and what a purifier optimizes is no evidence."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secure_export.errors import PolicyError
from secure_export.policy import judge
from secure_export.policy.limits import MODES, Metric
from secure_export.policy.presets import PRESETS
from secure_export.records.measured import Count, Finding, Paired
from secure_export.records.reported import Report
from secure_export.records.searches import Aim, FoundTrigger, Rounding, Search, aims
from secure_export.report.schema import dump_report, parse_report
from secure_export.statistics import conformal_p
from tests.judging import make_policy, make_report

N = 1000


def search(mode: str, hits: int, setting: str = "fp32", **changes: Any) -> Search:
    found = FoundTrigger(1, Paired(hits, 0, N), Count(hits, N), Paired(hits, 0, N))
    others = tuple(FoundTrigger(c, Paired(0, 0, N)) for c in (0, 2)) if mode == "cold" else ()
    plain = Search(
        "purified", setting, "patch", mode, "mask of 12 positions", (0, 1, 2), True, Count(99, 100),
        40, 40, 5000, 1.0, "", (found, *others),
    )  # fmt: skip
    return replace(plain, **changes)


def rounding(z: float, **changes: Any) -> Rounding:
    return replace(
        Rounding("purified", "int8", 20, 1.0, 1.0, z, 0.5, 19, (0.1, 0.1, 0.1, 0.1), None, 1.0), **changes
    )


def findings(rule: dict[str, Any], *records: Any, **changes: Any) -> list[Finding]:
    """What the judge says of one evidence rule beside a rule on inverted_lift that binds nothing else."""
    rules = [rule] if rule["metric"] == "inverted_lift" else [rule, ANY]
    section = {"preset": None, "probes": [{"kind": "patch"}], "rules": rules} | changes
    policy = make_policy(evidence=section)
    report = make_report()
    searches = tuple(record for record in records if isinstance(record, Search))
    traces = tuple(record for record in records if isinstance(record, Rounding))
    report = replace(report, evidence=replace(report.evidence, searches=searches, roundings=traces))
    return [f for f in judge(policy, report).findings if f.rule == rule["metric"]]


ANY = {"metric": "inverted_lift", "at_most": 0.9, "settings": ["fp32"]}
LIFT = {"metric": "inverted_lift", "at_most": 0.3, "settings": ["fp32"]}
REPLAY = {"metric": "replay_lift", "at_most": 0.2}


@pytest.mark.parametrize(
    ("records", "passed", "message"),
    [
        ([search("cold", 100)], True, "no evidence found with patch (mask of 12 positions; 40 steps"),
        ([search("cold", 400)], False, "probe patch, class 1"),
        ([search("cold", 295)], None, "too few samples"),
        ([], None, "0 searches in the report, expected one"),
        ([search("cold", 100), search("cold", 100)], None, "2 searches in the report"),
        ([search("cold", 100, lane="original")], None, "0 searches"),
        ([search("replay", 100)], None, "0 searches"),
        ([search("cold", 100, unsearched="collapsed: all into one")], None, "collapsed: all into one"),
        ([search("cold", 100, steps=10)], None, "cut short after 10 of 40 steps"),
        ([search("cold", 100, gradient=False)], None, "searched by queries alone"),
        ([search("cold", 900, gradient=False)], False, "breaks"),
        ([search("cold", 400, steps=10)], False, "breaks at most 0.3"),
        ([search("cold", 100, found=())], None, "no trigger was scored"),
        (
            [search("cold", 100, found=search("cold", 100).found[:2])],
            None,
            "2 of 3 classes searched, too few",
        ),
        ([search("cold", 400, found=search("cold", 400).found[:2])], False, "breaks at most 0.3"),
    ],
)
def test_what_was_not_searched_cannot_pass(records: list[Search], passed: bool | None, message: str) -> None:
    (finding,) = findings(LIFT, *records)
    assert finding.passed is passed
    assert message in finding.message
    assert "clean" not in finding.message


def test_each_mode_is_read_by_its_own_rule() -> None:
    for metric, mode in (("replay_lift", "replay"), ("warm_asr", "warm"), ("inverted_asr", "cold")):
        others = [search(other, 900) for other in MODES.values() if other != mode]
        rule = {"metric": metric, "at_most": 0.3, "settings": ["fp32"]}
        (finding,) = findings(rule, search(mode, 10), *others, search("cold", 10, lane="original"))
        assert finding.passed is True, metric


def test_rounding_is_limited_and_missing_rounding_is_undecided() -> None:
    rule = {"metric": "rounding_z", "at_most": 6.0, "settings": ["int8"]}
    assert findings(rule, rounding(3.0))[0].passed is True
    assert findings(rule, rounding(60.0))[0].passed is False
    assert findings(rule, rounding(float("nan")))[0].passed is False
    assert findings(rule, rounding(3.0, unsearched="no float file"))[0].passed is None
    assert findings(rule, rounding(0.0, layers=0))[0].passed is None
    assert findings(rule)[0].passed is None


def test_p_against_clean_references() -> None:
    rule = {"metric": "inverted_p", "at_least": 0.3, "settings": ["fp32"]}
    references = {"references": ["a.safetensors", "b.safetensors", "c.safetensors"]}
    assert findings(rule, search("cold", 10, p=0.5, references=3), **references)[0].passed is True
    assert findings(rule, search("cold", 10, p=0.25, references=3), **references)[0].passed is False
    assert findings(rule, search("cold", 10), **references)[0].passed is None
    with pytest.raises(PolicyError, match="could never fail"):
        findings(rule, search("cold", 10))


def test_the_verdict_says_how_many_classes_went_to_the_end() -> None:
    (finding,) = findings(LIFT, search("cold", 100, ended=1))
    assert "40 steps of gradients, 3 classes, 1 to the end" in finding.message
    (whole,) = findings(LIFT, search("cold", 100, ended=3))
    assert "3 classes)" in whole.message


@pytest.mark.parametrize(("metric", "mode"), [("inverted", "cold"), ("replay", "replay"), ("warm", "warm")])
def test_excess_over_clean_references_class_by_class(metric: str, mode: str) -> None:
    rule = {"metric": f"{metric}_excess", "at_most": 0.25, "settings": ["fp32"]}
    references = {"references": ["a.safetensors"]}
    above = {"references": 1, "excess_class": 3}
    original = search("cold", 10, lane="original")
    (kept,) = findings(rule, search(mode, 10, excess=0.2, **above), original, **references)
    (broken,) = findings(rule, search(mode, 10, excess=0.3, **above), original, **references)
    assert (kept.passed, broken.passed) == (True, False)
    assert "probe patch, class 3" in broken.message
    assert findings(rule, search(mode, 10), **references)[0].passed is None
    cut = search(mode, 10, excess=0.2, steps=1, planned=40, **above)
    (short,) = findings(rule, cut, original, **references)
    assert short.passed is None
    with pytest.raises(PolicyError, match="give references"):
        findings(rule, search(mode, 10))


BY_SOURCE = {"probes": [{"kind": "patch", "by_source": True}]}


@pytest.mark.parametrize(
    ("searched", "passed", "message"),
    [
        (aims(3, by_source=True), True, "6 pairs of classes"),
        (aims(3, by_source=True)[1:], None, "5 of 6 pairs of classes searched"),
        (aims(3), None, "0 of 6 pairs of classes searched"),
    ],
)
def test_a_search_by_source_passes_with_every_pair(
    searched: tuple[Aim, ...], passed: bool | None, message: str
) -> None:
    found = tuple(
        FoundTrigger(aim.into, Paired(9, 0, N), Count(9, N), Paired(9, 0, N), source_class=aim.source)
        for aim in searched
    )
    (finding,) = findings(LIFT, search("cold", 9, probe="source-patch", found=found, pairs=6), **BY_SOURCE)
    assert finding.passed is passed, finding.message
    assert message in finding.message


CONTRAST = {"probes": [{"kind": "patch", "contrast": True}, {"kind": "l2"}]}


@pytest.mark.parametrize(("metric", "mode"), [("inverted", "cold"), ("replay", "replay"), ("warm", "warm")])
def test_contrast_is_read_of_the_probes_that_make_one(metric: str, mode: str) -> None:
    rule = {"metric": f"{metric}_contrast", "at_most": 0.3, "settings": ["fp32"]}

    def found(hits: int | None) -> Search:
        plain = search(mode, 900)
        contrast = None if hits is None else Paired(hits, 0, N)
        return replace(
            plain,
            probe="contrast-patch",
            found=(replace(plain.found[0], contrast=contrast), *plain.found[1:]),
        )

    original = search("cold", 100, lane="original", probe="contrast-patch")
    (kept,) = findings(rule, found(100), original, **CONTRAST)
    (broken,) = findings(rule, found(400), original, **CONTRAST)
    (missing,) = findings(rule, found(None), original, **CONTRAST)
    assert (kept.passed, broken.passed, missing.passed) == (True, False, None)
    for probes, changes in ((["l2"], CONTRAST), ("all", {})):
        with pytest.raises(PolicyError, match="contrast: true"):
            findings(rule | {"probes": probes}, found(100), **changes)


@pytest.mark.parametrize(
    ("mode", "before", "after", "passed", "message"),
    [
        ("replay", 950, 10, True, "no evidence found with patch"),
        ("replay", 950, 400, False, "class 1, from fp32"),
        ("warm", 950, 400, False, "class 1, from fp32"),
        ("replay", 400, 400, True, "stands for itself"),  # natural, and no evidence on the original
        (
            "replay",
            890,
            400,
            False,
            "class 1, from fp32",
        ),  # not shown to hold .9
        ("replay", 400, None, None, "no original file"),
    ],
)
def test_a_rule_may_read_only_what_was_evident_on_the_original(
    mode: str, before: int, after: int | None, passed: bool | None, message: str
) -> None:
    rule = {"metric": f"{mode}_lift", "at_most": 0.2, "settings": ["fp32"], "evident": True}
    tried = search(mode, after or 0)
    tried = replace(tried, found=(replace(tried.found[0], origin="fp32"),))
    if after is None:
        tried = replace(tried, found=(), unsearched="no original file could be searched")
    elsewhere = search("cold", 950, "int3", lane="original")  # a setting of another policy
    (finding,) = findings(rule, search("cold", before, lane="original"), elsewhere, tried)
    assert finding.passed is passed
    assert message in finding.message


def test_a_trigger_that_was_evident_and_was_not_tried_again_leaves_the_rule_undecided() -> None:
    rule = {"metric": "replay_lift", "at_most": 0.2, "settings": ["fp32"], "evident": True}
    other = replace(search("cold", 950).found[0], target_class=2)
    original = search("cold", 950, lane="original")
    original = replace(original, found=(*original.found[:-1], other))
    tried = search("replay", 10)
    tried = replace(tried, found=(replace(tried.found[0], origin="fp32"),))
    (finding,) = findings(rule, original, tried)
    assert finding.passed is None
    assert "class 2" in finding.message
    assert "not tried again" in finding.message


@pytest.mark.parametrize("evident", [False, True])
@pytest.mark.parametrize("mode", ["replay", "warm"])
@pytest.mark.parametrize(
    ("originals", "message"),
    [
        ([search("cold", 100, lane="original", steps=10)], "original fp32: cut short"),
        ([search("cold", 100, lane="original", gradient=False)], "original fp32: searched by queries"),
        ([search("cold", 100, lane="original", steps=0, unsearched="NaN")], "was not searched: NaN"),
        ([], "0 searches of the original fp32"),
        ([search("cold", 100, lane="original")] * 2, "2 searches of the original fp32"),
    ],
)
def test_what_was_tried_again_says_nothing_where_an_original_was_not_searched(
    originals: list[Search], message: str, mode: str, evident: bool
) -> None:
    rule = {"metric": f"{mode}_lift", "at_most": 0.2, "settings": ["fp32"], "evident": evident}
    (finding,) = findings(rule, *originals, search(mode, 10))
    assert finding.passed is None
    assert message in finding.message
    (found,) = findings(REPLAY | {"settings": ["fp32"]}, *originals, search("replay", 900))
    assert found.passed is False, "a find stays one"


def test_the_same_class_from_another_file_is_not_what_was_evident() -> None:
    """In int8 .74 breaks a rule, in fp32 .75 breaks none; only the latter was replayed."""
    rules = [
        {"metric": "inverted_lift", "at_most": 0.8, "settings": ["fp32"]},
        {"metric": "inverted_lift", "at_most": 0.4, "settings": ["int8"]},
        {"metric": "replay_lift", "at_most": 0.08, "evident": True, "settings": ["int8"]},
    ]
    cold = [search("cold", 50, name) for name in ("fp32", "int8")]
    originals = [search("cold", 750, lane="original"), search("cold", 740, "int8", lane="original")]
    policy = make_policy(evidence={"preset": None, "probes": [{"kind": "patch"}], "rules": rules})
    for origin, passed in (("fp32", None), ("int8", False)):
        tried = search("replay", 600, "int8")
        tried = replace(tried, found=(replace(tried.found[0], origin=origin),))
        report = make_report()
        searches = (*cold, *originals, tried)
        report = replace(report, evidence=replace(report.evidence, searches=searches))
        (finding,) = [f for f in judge(policy, report).findings if f.rule == "replay_lift"]
        assert finding.passed is passed, origin


def test_a_stored_search_stands_only_for_a_policy_that_asks_for_the_same() -> None:
    section = {"preset": None, "probes": [{"kind": "patch"}], "rules": [LIFT]}
    report = make_report()
    evidence = replace(report.evidence, searches=(search("cold", 10),))
    text = yaml.safe_dump({"evidence": section, "locate": {"methods": [{"kind": "latent-shift"}]}})
    report = replace(report, evidence=evidence, policy_text=text)

    def missing(**changes: Any) -> list[str]:
        found = judge(make_policy(evidence=section | changes), report).findings
        return [f.message for f in found if f.rule == "missing" and f.passed is None]

    assert missing() == []
    assert missing(rules=[LIFT | {"at_most": 0.1}]) == [], "limits are free"
    assert "probes" in missing(probes=[{"kind": "patch", "steps": 500}])[0]
    assert "samples" in missing(samples=5000)[0]
    assert "references" in missing(references=["a.safetensors"])[0]
    text = text.replace("kind: latent-shift", "kind: latent-shift\n    min_score: 9.0")
    found = judge(make_policy(), replace(report, policy_text=text)).findings
    (other,) = [f for f in found if f.rule == "missing"]
    assert other.passed is None
    assert "located with" in other.message


def test_a_trace_that_no_layer_could_be_read_for_is_undecided() -> None:
    for metric in ("ks", "edge"):
        rule = {"metric": f"rounding_{metric}", "at_most": 6.0, "settings": ["int8"]}
        (finding,) = findings(rule, rounding(0.0, **{metric: None}))
        assert finding.passed is None
        assert "too few residues" in finding.message


PURIFIED = ("margin", "latent", "norm", "shift", "logit", "score")


def test_no_rule_can_read_what_a_purifier_optimizes() -> None:
    """LMR drives margins and latent norms of the class it repels, so after it they say what it wants."""
    read = {metric.split("_", 1)[1] for metric in get_args(Metric)}
    assert read == {"asr", "lift", "p", "excess", "contrast", "ks", "edge", "z"}
    carried = {f.name for record in (Search, FoundTrigger, Rounding) for f in fields(record)}
    assert not [name for name in carried if any(word in name for word in PURIFIED)]
    for name in ("latent_norm", "clean_margin", "margin_asr", "suspect_score"):
        with pytest.raises(PolicyError, match="metric"):
            make_policy(evidence={"rules": [{"metric": name, "at_most": 0.5}]})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rules": [REPLAY]}, "nothing would be asked"),
        ({"rules": [LIFT], "preset": None}, "nothing would be searched"),
        ({"rules": [LIFT | {"probes": ["filter"]}]}, "filter is none of the probes"),
        ({"rules": [LIFT | {"at_most": 30.0}]}, "did you mean 0.3"),
        ({"rules": [LIFT | {"settings": ["nowhere"]}]}, "matches no setting"),
        ({"rules": [LIFT], "probes": [{"kind": "patch"}, {"kind": "patch"}]}, "named twice"),
        ({"rules": [LIFT, {"metric": "rounding_z", "at_most": 5}], "rounding": False}, "rounding is off"),
        ({"rules": [LIFT | {"at_least": 0.5}]}, "takes at_most"),
        ({"rules": [LIFT | {"evident": True}]}, "evident means nothing"),
        (
            {"rules": [LIFT, REPLAY | {"evident": True}], "replayed": 4},
            "no more be replayed than scored",
        ),
        (
            {
                "rules": [
                    LIFT | {"probes": ["patch"]},
                    REPLAY | {"evident": True, "probes": ["patch", "warp"]},
                ]
            },
            "counts what warp found",
        ),
        ({"rules": [LIFT, REPLAY]}, "binds int8, where no inverted_ rule reads what patch, l2, warp"),
        (
            {"rules": [ANY | {"settings": "all", "probes": ["patch"]}, REPLAY | {"probes": ["l2"]}]},
            "no inverted_ rule reads what l2 finds",
        ),
        (
            {"rules": [LIFT], "preset": None, "probes": [{"kind": "l2"}], "warm": ["patch"]},
            "none of the probes",
        ),
        (
            {"rules": [LIFT, {"metric": "warm_lift", "at_most": 0.4, "probes": ["warp"]}], "warm": ["patch"]},
            "never searched warm",
        ),
    ],
)
def test_evidence_section_that_could_not_decide_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_policy(evidence=section)


def test_contrast_alone_does_not_release() -> None:
    """A trigger that lies in no weight stays in every reference."""
    rules = [{"metric": "inverted_contrast", "at_most": 0.5}]
    with pytest.raises(PolicyError, match="every inverted_ rule on 'fp32' reads contrast"):
        make_policy(evidence={"preset": "contrast", "rules": rules})
    plain = {"metric": "inverted_lift", "at_most": 0.5, "probes": ["patch", "l2", "warp"]}
    policy = make_policy(evidence={"preset": ["fast", "contrast"], "rules": [*rules, plain]})
    assert policy.evidence
    assert policy.evidence.names[:4] == ("patch", "l2", "warp", "contrast-patch")


def test_presets_name_three_families_at_least() -> None:
    """But for those that stand beside others: they search by pairs, or along slopes that are lent."""
    for preset, probes in PRESETS.items():
        if all(probe.get("by_source") or probe.get("surrogate") for probe in probes):
            continue
        assert len({probe["kind"] for probe in probes}) >= 3, preset


def test_searches_survive_the_report_file() -> None:
    report = make_report()
    evidence = replace(report.evidence, searches=(search("cold", 3),), roundings=(rounding(1.0),))
    full: Report = replace(report, evidence=evidence)
    assert parse_report(dump_report(full)) == full


@given(st.integers(0, 10_000), st.integers(3, 12))
def test_conformal_p_raises_false_alarms_no_more_often_than_it_says(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(n, 4)) + np.arange(4)).tolist()
    ps = [conformal_p([*rows[:i], *rows[i + 1 :], rows[i]])[0] for i in range(n)]
    for alpha in (1 / n, 0.25, 0.5):
        assert sum(p <= alpha for p in ps) <= alpha * n + 1e-9
    p, named = conformal_p([*rows, [0, 1, 50, 3]])
    assert p == pytest.approx(1 / (n + 1))
    assert named == 2
