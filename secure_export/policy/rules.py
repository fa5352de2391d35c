"""judge(policy, report) to a Verdict, and the only way from a verdict to a release.

A rule holds when the exact one-sided bound at the policy's confidence is within the limit, is broken when the
estimate itself is not, and is undecided in between. Where a rule looks at m classes, each bound is taken at
level 1 - alpha/m (Bonferroni), so that all m hold together with the stated confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from secure_export.errors import NoVerdict, Refused
from secure_export.policy._readings import Reading, decide, message, severity
from secure_export.policy.builtin import builtin_findings, measured, suspected
from secure_export.policy.check import for_artifact
from secure_export.policy.evidence_rules import evidence_findings
from secure_export.policy.limits import PER_TRIGGER, Rule
from secure_export.policy.schema import ARTIFACT, Policy, Setting
from secure_export.records.measured import (
    Count,
    Finding,
    Measurement,
    Outcome,
    Paired,
    TriggerCounts,
    Verdict,
)
from secure_export.records.reported import Report


def judge(policy: Policy, report: Report) -> Verdict:
    """Every rule of `policy` on every setting that it binds, and what no policy can turn off.

    Only the purified lane is ruled. One finding per rule and setting: the worst trigger and class. Nothing is
    measured here, so a stored report can be judged under another policy.
    """
    policy = for_report(policy, report)
    findings = list(builtin_findings(policy, report))
    for setting in policy.expanded_settings():
        measurement = measured(report, setting)
        for index, rule in enumerate(policy.rules):
            if measurement is not None and rule.binds(setting):
                line = policy.source.line(("rules", index))
                findings.append(_rule(rule, setting, measurement, policy, report, line))
    findings += evidence_findings(policy, report)
    return Verdict(outcome(findings), tuple(findings))


def for_report(policy: Policy, report: Report) -> Policy:
    """The policy as it binds this report: of a file that another tool made there is one setting alone.

    Raises:
        PolicyError: no rule on asr or lift, or none on accuracy, binds such a file.
    """
    if report.subject.architecture == ARTIFACT and policy.subject.artifact is None:
        return for_artifact(policy, report.subject.path)
    return policy


def outcome(findings: Sequence[Finding]) -> Outcome:
    """Released only when there are findings and every one of them has passed."""
    if any(finding.passed is False for finding in findings):
        return "refused"
    return "released" if findings and all(finding.passed for finding in findings) else "no_verdict"


def _rule(
    rule: Rule, setting: Setting, measurement: Measurement, policy: Policy, report: Report, line: int | None
) -> Finding:
    alpha = 1 - policy.confidence
    if rule.metric in PER_TRIGGER:
        alpha /= max(1, len(_classes(rule, report)))
    if rule.metric == "source_lift":
        alpha /= max(1, report.subject.classes - 1)
    decided = [decide(reading, rule, alpha) for reading in _readings(rule, measurement, policy, report)]
    if rule.metric == "source_lift":
        decided = [_of_all_classes(reading, measurement.acc.total) for reading in decided]
    worst = max(
        decided, key=lambda reading: severity(reading, rule), default=Reading("", None, 0, why="no class")
    )
    return Finding(
        rule=rule.metric,
        setting=setting.name,
        observed=worst.observed,
        bound=worst.bound,
        limit=rule.limit,
        n=worst.n,
        passed=worst.passed,
        message=message(worst, rule),
        needed=worst.needed,
        line=line,
    )


def _classes(rule: Rule, report: Report) -> Sequence[int]:
    suspects = suspected(report) if rule.classes == "suspects" else ()
    return suspects or range(report.subject.classes)


def _readings(rule: Rule, measurement: Measurement, policy: Policy, report: Report) -> Iterator[Reading]:
    # A file of another tool may have nothing to agree with.
    n = min(measurement.acc.total, measurement.agreement.total)
    if rule.metric == "logit_difference":
        yield Reading("", measurement.logit_difference, n)
    elif rule.metric not in PER_TRIGGER:
        value: Count | Paired = getattr(measurement, rule.metric)
        yield Reading("", value, value.total)
    else:
        for trigger in policy.triggers:
            if rule.triggers != "all" and trigger.name not in rule.triggers:
                continue
            found = [counts for counts in measurement.triggers if counts.trigger == trigger.name]
            if rule.metric == "source_lift" and len(found) == 1:
                for c in _classes(rule, report):
                    yield from _by_source(found[0], c, measurement, report.subject.classes)
                continue
            per_class = getattr(found[0], rule.metric) if len(found) == 1 else ()
            for c in _classes(rule, report):
                known = 0 <= c < len(per_class) == report.subject.classes
                count = per_class[c] if known else None
                yield Reading(f"trigger {trigger.name}, class {c}", count, count.total if count else 0)


def _of_all_classes(reading: Reading, total: int) -> Reading:
    """What is needed of one class, told as samples of all classes with the shares that they have."""
    if reading.needed is None or not reading.n:
        return replace(reading, needed=None)
    return replace(reading, needed=-(-reading.needed * total // reading.n))


def _by_source(counts: TriggerCounts, c: int, measurement: Measurement, classes: int) -> Iterator[Reading]:
    """The lift into class c of every class that is carried there, and of the fewest samples that are not."""
    where = f"trigger {counts.trigger}, class {{}} into {c}"
    carried = _carried(counts, c, measurement, classes)
    of_class = measurement.of_class
    if carried is None or of_class is None:
        yield Reading(where.format("?"), None, 0)
        return
    for source, lift in carried.items():
        yield Reading(where.format(source), lift, lift.total)
    others = set(range(classes)) - carried.keys() - {c}
    if others:
        fewest = min(others, key=lambda source: of_class[source])
        yield Reading(where.format(fewest), Paired(0, 0, of_class[fewest]), of_class[fewest])


def _carried(
    counts: TriggerCounts, c: int, measurement: Measurement, classes: int
) -> Mapping[int, Paired] | None:
    """By source the lift into class c; None where the counts are missing or contradict each other."""
    of_class = measurement.of_class
    if counts.pairs is None or of_class is None or not len(of_class) == len(counts.lift) == classes:
        return None
    pairs = [pair for pair in counts.pairs if pair.into == c]
    whole = counts.lift[c]
    agree = (
        min(of_class) >= 0
        and sum(of_class) == measurement.acc.total == whole.total + of_class[c]
        and len({pair.source for pair in pairs}) == len(pairs)
        and all(
            0 <= pair.source < classes and pair.source != c and pair.lift.total == of_class[pair.source]
            for pair in pairs
        )
        and sum(pair.lift.gained for pair in pairs) == whole.gained
        and sum(pair.lift.lost for pair in pairs) <= whole.lost
    )
    return {pair.source: pair.lift for pair in pairs} if agree else None


@dataclass(frozen=True)
class Approved:
    """A verdict that allows a release; cannot be made from any other, whatever its `outcome` says.

    Raises:
        Refused: a finding has failed. NoVerdict: a finding is undecided, or there are none.
    """

    verdict: Verdict

    def __post_init__(self) -> None:
        findings = self.verdict.findings
        failed = [finding for finding in findings if finding.passed is False]
        if failed:
            raise Refused("\n".join(_line(finding) for finding in failed), hint="nothing was released")
        undecided = [finding for finding in findings if finding.passed is None]
        if undecided or not findings or self.verdict.outcome != "released":
            lines = [_line(finding) for finding in undecided] or [
                "the verdict holds no findings that allow a release"
            ]
            raise NoVerdict("\n".join(lines), hint="nothing was released")

    @property
    def settings(self) -> frozenset[str]:
        """Settings that something was found about."""
        return frozenset(finding.setting for finding in self.verdict.findings)


def approve(verdict: Verdict) -> Approved:
    """The verdict as a permission to release.

    Raises:
        Refused: a finding has failed; the message lists every one. NoVerdict: something is undecided; the
            message lists it, with the samples needed.
    """
    return Approved(verdict)


def _line(finding: Finding) -> str:
    return f"{finding.setting}: {finding.rule}: {finding.message}"
