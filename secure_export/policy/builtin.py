"""Findings that no policy can turn off: what is missing, what changed nothing, what was found and left in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from secure_export.errors import PolicyError
from secure_export.policy.evidence import EvidenceSpec
from secure_export.policy.schema import DataSpec, Locate, Policy, Setting
from secure_export.policy.yaml import parse
from secure_export.records.measured import (
    COLLAPSED,
    EXCESS,
    FIT_ACC,
    LOOKED_AT_AGAIN,
    UNREAD,
    Finding,
    Measurement,
    SettingResult,
    asked,
)
from secure_export.records.reported import Report, ReportedSetting
from secure_export.words import first_line

LEAST_CHANGED = 0.5
"""Share of samples that a known trigger has to change, for its rules to say anything."""
SAME = ("precise_int8", "data.fit", "data.calibration", "data.resize", "data.channels")
"""What changes what is measured: a stored report answers for its own alone."""
UNSAID = {"precise_int8": Policy.model_fields["precise_int8"].default, "data": DataSpec().model_dump()}
"""What a policy means that does not say it."""
READ: tuple[tuple[str, type, str], ...] = (
    ("data", dict, "section"),
    ("locate", dict, "section"),
    ("locate.rounds", int, "number"),
    ("locate.methods", list, "list"),
)
"""What is read of a stored report's policy: sections before what stands in them."""


def builtin_findings(policy: Policy, report: Report) -> Iterator[Finding]:
    """In the order: settings, triggers, purification, locators and suspects."""
    for setting in policy.expanded_settings():
        reported = reported_as(report, setting)
        if isinstance(reported, str):
            yield _finding("missing", setting.name, None, reported)
        else:
            yield from _setting(setting, reported.purified, purified=report.purification is not None)
    yield from _triggers(policy, report)
    yield from _asked_otherwise(policy, report)
    yield from _purification(report)
    yield from _locators(policy, report)
    yield from _suspects(policy, report)


def reported_as(report: Report, setting: Setting) -> ReportedSetting | str:
    """What the report holds for exactly this chain of steps, or why it holds nothing."""
    found = [reported for reported in report.settings if reported.name == setting.name]
    if len(found) != 1:
        return f"the report holds {len(found)} settings called {setting.name!r}, expected one"
    if _plain(found[0].steps) != _plain(setting.steps):
        return f"measured with steps {_plain(found[0].steps)}, the policy asks for {_plain(setting.steps)}"
    artifact = found[0].purified.artifact
    if artifact is not None and artifact.format != setting.format["kind"]:
        return f"measured as {artifact.format}, the policy asks for {setting.format['kind']}"
    return found[0]


def measured(report: Report, setting: Setting) -> Measurement | None:
    """The purified lane's measurement of this chain of steps, which is what rules read."""
    reported = reported_as(report, setting)
    return None if isinstance(reported, str) else reported.purified.measurement


def suspected(report: Report) -> tuple[int, ...]:
    """Every class that any locator names or that was purified, ascending."""
    named = {suspect.target_class for suspect in report.suspects if suspect.target_class is not None}
    return tuple(sorted(named | _purified(report)))


def _purified(report: Report) -> set[int]:
    return set(report.purification.target_classes) if report.purification else set()


def _finding(rule: str, setting: str, passed: bool | None, message: str) -> Finding:
    return Finding(rule, setting, None, None, None, 0, passed, message)


def _plain(value: Any) -> Any:
    """As JSON would bring it back, so that a stored report compares equal to one in memory."""
    return json.loads(json.dumps(value, default=str))


def _setting(setting: Setting, result: SettingResult, *, purified: bool) -> Iterator[Finding]:
    artifact, measurement = result.artifact, result.measurement
    if result.unmeasured is not None:
        detail = f": {result.unmeasured.detail}" if result.unmeasured.detail else ""
        yield _finding("unmeasured", setting.name, None, f"{result.unmeasured.reason}{detail}")
    elif artifact is None or measurement is None:
        lacking = "file" if artifact is None else "measurement"
        yield _finding("unmeasured", setting.name, None, f"the report holds no {lacking}")
    owners = {(result.lane, result.setting)}
    if artifact is not None:
        owners.add(("purified", artifact.setting))
    if measurement is not None:
        owners.add((measurement.lane, measurement.setting))
    if owners != {("purified", setting.name)}:
        named = ", ".join(sorted(f"{lane} {name}" for lane, name in owners))
        yield _finding(
            "mismatch", setting.name, None, f"file and numbers belong to different settings: {named}"
        )
    if artifact is None:
        return
    for change in artifact.changes:
        if change.changed <= 0:
            message = f"{change.kind} changed {change.changed} of {change.total} {change.unit}"
            yield _finding("unchanged-step", setting.name, False, message)
    steps = asked(setting.steps, purified=purified)
    if len(artifact.changes) != len(steps):
        message = f"{len(steps)} steps, but {len(artifact.changes)} say what they changed"
        yield _finding("unchanged-step", setting.name, None, message)


def _triggers(policy: Policy, report: Report) -> Iterator[Finding]:
    for trigger in policy.triggers:
        wanted = {"name": trigger.name, **trigger.plugin}
        known = [_plain(spec) for spec in report.evidence.known_triggers if spec.get("name") == trigger.name]
        if known != [_plain(wanted)]:
            message = (
                f"trigger {trigger.name!r} was measured as {known or 'nothing'}, the policy asks for {wanted}"
            )
            yield _finding("missing", "all", None, message)
    changed = {
        counts.trigger: counts.changed
        for setting in report.settings
        if setting.purified.measurement is not None
        for counts in setting.purified.measurement.triggers
        if counts.changed is not None
    }
    for name, count in changed.items():
        if count.rate < LEAST_CHANGED:
            message = f"trigger {name!r} changes {count.hits} of {count.total} samples, which shows nothing"
            yield _finding("unchanged-trigger", "all", None, message)


def _asked_otherwise(policy: Policy, report: Report) -> Iterator[Finding]:
    """Where a stored report was located or searched otherwise than this policy asks."""
    if not report.policy_text or policy.sha256 == report.policy_sha256:
        return
    before = _own_policy(report)
    if isinstance(before, str):
        yield _finding("missing", "all", None, f"the report's own policy {before}")
        return
    for key in SAME:
        unsaid = _at(UNSAID, key, {}, None)
        had, wanted = _at(before, key, report.overrides, unsaid), _at(policy.model_dump(), key, {}, unsaid)
        if _plain(had) != _plain(wanted):
            yield _finding("missing", "all", None, f"measured with {key} {had}, the policy asks for {wanted}")
    rounds = (before.get("locate") or {}).get("rounds") or Locate.model_fields["rounds"].default
    if rounds < policy.locate.rounds:
        message = f"located in {rounds} rounds at most, the policy asks for {policy.locate.rounds}"
        yield _finding("missing", "all", None, message)
    every = policy.locate.unconfirmed != "accept"
    heard = [m for m in policy.locate.methods if every or m["kind"] in policy.locate.decisive]
    located = (before.get("locate") or {}).get("methods") or []
    for method in heard:
        if _plain(method) not in [_plain(one) for one in located]:
            message = f"located with {located or 'nothing'}, the policy asks for {method}"
            yield _finding("missing", "all", None, message)
    if policy.evidence is None:
        return
    try:
        asked_for = EvidenceSpec.model_validate_json(json.dumps(before.get("evidence"), default=str))
    except ValidationError:
        yield _finding("missing", "all", None, "the report's own policy has no evidence section")
        return
    for key, wanted in policy.evidence.effort.items():
        if _plain(asked_for.effort[key]) != _plain(wanted):
            message = f"searched with {key} {asked_for.effort[key]}, the policy asks for {wanted}"
            yield _finding("missing", "all", None, message)


def _own_policy(report: Report) -> Mapping[str, Any] | str:
    """The policy that a report carries, or why nothing can be read in it."""
    try:
        found, _ = parse(report.policy_text, "the policy in the report")
    except PolicyError as error:
        return f"cannot be read: {first_line(error)}"
    for key, kind, expected in READ:
        section, _, name = key.rpartition(".")
        value = ((found.get(section) or {}) if section else found).get(name)
        if value is not None and not isinstance(value, kind):
            return f"cannot be read: {key} is a {type(value).__name__}, expected a {expected}"
    return found


def _at(policy: Mapping[str, Any], key: str, overrides: Mapping[str, Any], default: Any) -> Any:
    """A policy's value by its dotted key, a flag's before the file's."""
    section, _, name = key.rpartition(".")
    return overrides.get(key, ((policy.get(section) or {}) if section else policy).get(name, default))


def _purification(report: Report) -> Iterator[Finding]:
    pairs = [(setting.original.artifact, setting.purified.artifact) for setting in report.settings]
    both = [(original.sha256, purified.sha256) for original, purified in pairs if original and purified]
    if _purified(report) and both and all(original == purified for original, purified in both):
        message = "purification changed nothing: every purified file has the bytes of the original one"
        yield _finding("unchanged-purification", "all", False, message)


def _locators(policy: Policy, report: Report) -> Iterator[Finding]:
    """A locator whose word counts must have spoken, and have been able to judge what it spoke of.

    What is compressed on trial and does not ship may be a ruin, of which nobody can name a class.
    """
    spared = {one.name for one in policy.expanded_settings() if one.steps and not one.released}
    spared |= {name + LOOKED_AT_AGAIN for name in spared}
    for method in policy.locate.methods:
        kind = method["kind"]
        if kind not in policy.locate.decisive and policy.locate.unconfirmed == "accept":
            continue
        spoken = [suspect for suspect in report.suspects if suspect.locator == kind]
        if not spoken:
            yield _finding("no-locator", "all", None, f"{kind} did not run")
        for suspect in spoken:
            if UNREAD in suspect.evidence:
                message = f"{kind} could not read this setting: {suspect.evidence[UNREAD]}"
                yield _finding("no-locator", suspect.setting, None, message)
            elif suspect.evidence.get(COLLAPSED) and suspect.setting not in spared:
                acc, excess = (_share(suspect.evidence.get(key)) for key in (FIT_ACC, EXCESS))
                message = (
                    f"{kind} names no class of a collapsed model, and takes this for one: {acc} of fit "
                    f"right, one class predicted for {excess} too many (min_acc, max_excess)"
                )
                yield _finding("no-locator", suspect.setting, None, message)


def _share(value: float | int | str | bool | None) -> str:
    return f"{value:.0%}" if isinstance(value, float | int) else "an unknown share"


def _suspects(policy: Policy, report: Report) -> Iterator[Finding]:
    named: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for suspect in report.suspects:
        if suspect.target_class is not None:
            named[suspect.target_class][suspect.locator].append(suspect.setting)
    for target_class in sorted(named.keys() - _purified(report)):
        locators = named[target_class]
        who = "; ".join(
            f"{locator} on {', '.join(settings)}" for locator, settings in sorted(locators.items())
        )
        where = ", ".join(dict.fromkeys(setting for settings in locators.values() for setting in settings))
        message = f"class {target_class} is suspected ({who}) and was not purified"
        passed = False
        if not locators.keys() & set(policy.locate.decisive):
            passed = policy.locate.unconfirmed == "accept"
            message += (
                f"; no decisive locator names it, the policy says unconfirmed: {policy.locate.unconfirmed}"
            )
        yield _finding("suspect-not-purified", where, passed, message)
