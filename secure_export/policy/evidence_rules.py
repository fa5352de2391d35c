"""What the rules of the `evidence` section say of the searches that a report holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from secure_export.policy._readings import Reading, decide, message, severity
from secure_export.policy.evidence import EvidenceSpec
from secure_export.policy.limits import EvidenceRule
from secure_export.policy.schema import Policy, Setting
from secure_export.records.measured import Count, Finding, Paired
from secure_export.records.reported import Report
from secure_export.records.searches import Aim, FoundTrigger, Search


def evidence_findings(policy: Policy, report: Report) -> Iterator[Finding]:
    """One finding per rule and setting of the purified lane: the worst trigger, or what was not searched.

    A search that found nothing is no proof of a clean model, and no message says so: it names the budget.
    """
    if policy.evidence is None:
        return
    for setting in policy.expanded_settings():
        for index, rule in enumerate(policy.evidence.rules):
            if rule.binds(setting):
                line = policy.source.line(("evidence", "rules", index))
                yield replace(_finding(rule, policy.evidence, setting, policy, report), line=line)


def _finding(
    rule: EvidenceRule, spec: EvidenceSpec, setting: Setting, policy: Policy, report: Report
) -> Finding:
    if rule.mode in ("replay", "warm") and report.purification is None:
        text = f"{rule.metric}: nothing was purified, so the search on this file stands for itself"
        return Finding(rule.metric, setting.name, None, None, rule.limit, 0, True, text)
    readings = list(
        _searched(rule, spec, setting, policy, report) if rule.mode else _rounded(rule, setting, report)
    )
    if rule.evident and not readings:
        text = (
            f"{rule.metric}: all that was found on original files holds the rules there, "
            "so the search on this file stands for itself"
        )
        return Finding(rule.metric, setting.name, None, None, rule.limit, 0, True, text)
    alpha = (1 - policy.confidence) / max(1, len(readings))
    decided = [_decided(reading, rule, alpha) for reading in readings]
    worst = max(decided, key=lambda reading: severity(reading, rule))
    text = message(worst, rule)
    if worst.passed and rule.mode:
        text += f"; no evidence found with {_effort(rule, spec, setting, report)}"
    return Finding(
        rule=rule.metric,
        setting=setting.name,
        observed=worst.observed,
        bound=worst.bound,
        limit=rule.limit,
        n=worst.n,
        passed=worst.passed,
        message=text,
        needed=worst.needed,
    )


def _decided(reading: Reading, rule: EvidenceRule, alpha: float) -> Reading:
    if reading.value is None:
        return reading
    decided = decide(reading, rule, alpha)
    if decided.passed and reading.why:  # a search that did too little: only a find is final
        return replace(decided, passed=None)
    return decided


def _purified(rule: EvidenceRule, kind: str, setting: Setting, report: Report) -> list[Search]:
    return [
        search
        for search in report.evidence.searches
        if (search.lane, search.setting, search.probe, search.mode)
        == ("purified", setting.name, kind, rule.mode)
    ]


def _searched(
    rule: EvidenceRule, spec: EvidenceSpec, setting: Setting, policy: Policy, report: Report
) -> Iterator[Reading]:
    kinds = spec.read_by(rule)
    if not kinds:
        yield Reading("", None, 0, why="no probe is searched this way")
    for kind in kinds:
        if rule.mode in ("replay", "warm"):
            yield from _untold(kind, spec, policy, report)
        searches = _purified(rule, kind, setting, report)
        if len(searches) != 1:
            yield Reading(
                f"probe {kind}", None, 0, why=f"{len(searches)} searches in the report, expected one"
            )
            continue
        search = searches[0]
        scored = [(found, value) for found in search.found if (value := _value(rule, found)) is not None]
        if search.unsearched or not scored:
            why = search.unsearched or "no trigger was scored"
            yield Reading(f"probe {kind}", None, 0, why=f"not searched: {why}")
        why = spec.lacking(search, report.subject.classes)
        if rule.reading in ("p", "excess"):
            compared: float | None = getattr(search, rule.reading)
            if compared is None:
                yield Reading(f"probe {kind}", None, 0, why="no references")
            else:
                aim = Aim(search.excess_class or 0, search.excess_source)
                where = f"probe {kind}, {aim}"
                yield Reading(where, compared, search.references, why=why)
            continue
        if rule.evident:
            settings, error = policy.expanded_settings(), 1 - policy.confidence
            evident = spec.evident(kind, settings, report.evidence.searches, error)
            scored = [one for one in scored if (one[0].origin, one[0].aim) in evident]
            for named in sorted({aim for _, aim in evident} - {found.aim for found, _ in scored}, key=str):
                why = "not held on an original file, and not tried again: run it under this policy"
                yield Reading(f"probe {kind}, {named}", None, 0, why=why)
        for found, value in scored:
            where = f"probe {kind}, {found.aim}"
            where += f", from {found.origin}" if found.origin else ""
            yield Reading(where, value, value.total, why=why)


def _untold(kind: str, spec: EvidenceSpec, policy: Policy, report: Report) -> Iterator[Reading]:
    """Original files that the policy asks about and that were not searched to the end.

    More may be found there than what was tried again, so nothing that was tried says enough.
    """
    for setting in policy.expanded_settings():
        if not spec.asks(setting, kind):
            continue
        before = [
            search
            for search in report.evidence.searches
            if (search.lane, search.setting, search.probe, search.mode)
            == ("original", setting.name, kind, "cold")
        ]
        if len(before) != 1:
            why = f"{len(before)} searches of the original {setting.name} in the report, expected one"
        elif before[0].unsearched:
            why = f"the original {setting.name} was not searched: {before[0].unsearched}"
        elif lacking := spec.lacking(before[0], report.subject.classes):
            why = f"more may be found on the original {setting.name}: {lacking}"
        else:
            continue
        yield Reading(f"probe {kind}", None, 0, why=why)


def _value(rule: EvidenceRule, found: FoundTrigger) -> Count | Paired | None:
    match rule.reading:
        case "asr":
            return found.asr
        case "contrast":
            return found.contrast
        case _:
            return found.lift


def _rounded(rule: EvidenceRule, setting: Setting, report: Report) -> Iterator[Reading]:
    found = [
        rounding
        for rounding in report.evidence.roundings
        if (rounding.lane, rounding.setting) == ("purified", setting.name)
    ]
    if len(found) != 1:
        yield Reading("", None, 0, why=f"{len(found)} readings of the rounding in the report, expected one")
        return
    rounding = found[0]
    if rounding.unsearched:
        yield Reading("", None, 0, why=f"not searched: {rounding.unsearched}")
        return
    if not rounding.layers:
        yield Reading("", None, 0, why="no weight of this file is an integer: give the rule its settings")
        return
    named = rounding.target_class
    where = f"{rounding.layers} layers" + (f", towards class {named}" if named is not None else "")
    value: float | None = getattr(rounding, rule.reading)
    why = "" if value is not None else "too few residues in every layer"
    yield Reading(where, value, rounding.layers, why=why)


def _effort(rule: EvidenceRule, spec: EvidenceSpec, setting: Setting, report: Report) -> str:
    parts = []
    for kind in spec.read_by(rule):
        for search in _purified(rule, kind, setting, report):
            how = "gradients" if search.gradient else "queries"
            steps = f"{search.steps} steps of {how}" if search.mode != "replay" else "replay"
            parts.append(f"{kind} ({search.budget}; {steps}, {search.extent})")
    return ", ".join(parts)
