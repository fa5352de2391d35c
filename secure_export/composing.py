"""The report before it is judged: everything measured, as data, and what is not shown by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from secure_export import __version__, defence
from secure_export.environment import versions
from secure_export.evidence import Gathered
from secure_export.lane import Bench
from secure_export.policy import EvidenceSpec, Policy, Setting
from secure_export.records.measured import Cost, SettingResult, Suspect, Verdict
from secure_export.records.memory import Splits, Subject
from secure_export.records.reported import (
    Evidence,
    Purification,
    Report,
    ReportedSetting,
    SplitInfo,
    SubjectInfo,
)
from secure_export.records.searches import Search
from secure_export.report.schema import SCHEMA
from secure_export.runtimes import runtime
from secure_export.words import printable

UNSEARCHED = "that no trigger exists: only the triggers listed above were applied"
SEARCHED = "that no trigger exists: the searches reach no further than the listed budgets"
UNPAIRED = (
    "that no trigger exists that carries the samples of one class alone: not every released file was "
    "searched for one, pair by pair (by_source)"
)
UNCOUNTED = (
    "what these triggers do to the samples of one class alone, which no rule on source_lift reads in every "
    "released file: {}"
)
NOT_SHOWN = (
    "anything about runtimes, their options, compression settings or CPUs that are not named here",
    "anything about inputs unlike the clean samples",
)

IMPRECISE = (
    "what int8 files do on x86 CPUs without VNNI in sessions that do not set session.x64quantprecision to 1"
)


def described(subject: Subject, splits: Splits) -> SubjectInfo:
    """What was handed in, as the report names it."""
    return SubjectInfo(
        path=printable(subject.source.name),
        sha256=subject.sha256,
        architecture=subject.architecture,
        classes=subject.classes,
        class_names=splits.class_names,
        head=subject.head,
        input_shape=subject.input_shape,
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
    )


def compose(
    policy: Policy,
    subject: SubjectInfo,
    bench: Bench,
    suspects: tuple[Suspect, ...],
    purification: Purification | None,
    originals: Sequence[SettingResult],
    purifieds: Sequence[SettingResult],
    gathered: Gathered,
    costs: Sequence[Cost],
    timings: Mapping[str, float],
    further: Sequence[str] = (),
) -> Report:
    """Everything measured, as data, before it is judged; `further` is what is not shown beside the usual."""
    settings = tuple(
        ReportedSetting(setting.name, setting.steps, setting.released, _named(original), _named(purified))
        for setting, original, purified in zip(policy.expanded_settings(), originals, purifieds, strict=True)
    )
    return Report(
        schema=SCHEMA,
        tool=__version__,
        policy_path=Path(policy.path).name,
        policy_sha256=policy.sha256,
        policy_text=policy.text,
        verdict=Verdict("no_verdict", ()),
        subject=subject,
        splits={
            name: SplitInfo(len(split), split.sha256)
            for name, split in (
                ("fit", bench.splits.fit),
                ("calibration", bench.splits.calibration),
                ("holdout", bench.splits.holdout),
            )
        },
        suspects=suspects,
        purification=purification,
        settings=settings,
        evidence=_evidence(policy, gathered, subject.classes, further),
        disagreements=defence.disagreements(suspects, policy.expanded_settings()),
        environment=_environment(originals, bench),
        timings=timings,
        overrides=policy.overrides,
        costs=tuple(costs),
    )


def _evidence(policy: Policy, gathered: Gathered, classes: int, further: Sequence[str]) -> Evidence:
    searches = gathered.searches
    probes = dict.fromkeys(search.probe for search in searches)
    done = sum(not search.unsearched for search in searches)
    ran = f"{', '.join(probes)}; {done} of {len(searches)} searches could be made"
    gaps = [SEARCHED if searches else UNSEARCHED, *NOT_SHOWN]
    released = [setting for setting in policy.expanded_settings() if setting.released]
    if searches and {setting.name for setting in released} - _paired(policy.evidence, searches, classes):
        gaps.append(UNPAIRED)
    if uncounted := [spec.name for spec in policy.triggers if not _counted(spec.name, released, policy)]:
        gaps.append(UNCOUNTED.format(", ".join(uncounted)))
    if policy.precise_int8:
        gaps.append(IMPRECISE)
    return Evidence(
        known_triggers=tuple({"name": spec.name, **spec.plugin} for spec in policy.triggers),
        trigger_search=ran if searches else "none",
        not_shown=(*gaps, *further),
        searches=searches,
        roundings=gathered.roundings,
    )


def _paired(spec: EvidenceSpec | None, searches: Sequence[Search], classes: int) -> set[str]:
    """Settings on whose purified file every pair of classes was searched as far as rules ask."""
    return {
        search.setting
        for search in searches
        if (search.lane, search.mode) == ("purified", "cold")
        and search.pairs
        and not search.unsearched
        and spec
        and not spec.lacking(search, classes)
    }


def _counted(trigger: str, released: Sequence[Setting], policy: Policy) -> bool:
    """Whether a rule reads what a known trigger does to each class alone, on everything that ships."""
    rules = [
        rule
        for rule in policy.rules
        if rule.metric == "source_lift"
        and rule.classes == "all"
        and rule.can_fail
        and (rule.triggers == "all" or trigger in rule.triggers)
    ]
    return all(any(rule.binds(setting) for rule in rules) for setting in released)


def _named(result: SettingResult) -> SettingResult:
    """The file by its place in the run directory: a report travels and says nothing of this machine."""
    if result.artifact is None:
        return result
    path = Path(result.artifact.path.parent.name, result.artifact.path.name)
    return replace(result, artifact=replace(result.artifact, path=path))


def _environment(results: Sequence[SettingResult], bench: Bench) -> Mapping[str, str]:
    """Versions, and for each runtime that measured a file its own options."""
    found = dict(versions())
    for kind in sorted({r.artifact.runtime for r in results if r.artifact is not None}):
        opened = runtime(kind, bench.runtime)
        found |= {f"{kind}.{name}": value for name, value in opened.environment().items()}
    return found
