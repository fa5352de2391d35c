"""What was suspected, what was done about it and what was looked for, in words; shared by the renderers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secure_export.records.measured import COLLAPSED, UNREAD, Artifact, Finding, Suspect
from secure_export.records.reported import Report
from secure_export.report._tables import Worst, as_received, class_label, percent, points, worst_lift
from secure_export.words import plural


@dataclass(frozen=True)
class Fact:
    """One line of the first screen."""

    label: str
    value: str
    note: str = ""


def facts(report: Report) -> tuple[Fact, ...]:
    """What a reviewer wants to know next after the verdict."""
    return (_accuracy(report), _lift(report), _suspected(report), _searched(report))


def _accuracy(report: Report) -> Fact:
    one = as_received(report)
    label = "Accuracy" if one else "Accuracy, original → purified"
    for setting in report.settings:
        original, purified = setting.original.measurement, setting.purified.measurement
        if original is not None and purified is not None:
            shares = [percent(m.acc.rate) for m in ((purified,) if one else (original, purified))]
            value = " → ".join(shares)
            return Fact(label, value, f"{setting.name}, {plural(purified.acc.total, 'holdout sample')}")
    return Fact(label, "not measured", "no setting was measured in both lanes")


def _lift(report: Report) -> Fact:
    label = "Worst ASR lift over all settings"
    original, purified = _worst_over(report, "original"), _worst_over(report, "purified")
    if original is None or purified is None:
        return Fact(label, "not measured", "no trigger was measured in both lanes")
    shown = (purified,) if as_received(report) else (original, purified)
    value = " → ".join(points(worst.value) for worst, _ in shown)
    places = [f"{w.trigger} → {class_label(report, w.target_class)} in {name}" for w, name in shown]
    return Fact(label, value, places[0] if len(set(places)) == 1 else f"{places[0]}; then {places[1]}")


def _worst_over(report: Report, lane: str) -> tuple[Worst, str] | None:
    found: list[tuple[Worst, str]] = []
    for setting in report.settings:
        measurement = (setting.original if lane == "original" else setting.purified).measurement
        worst = worst_lift(measurement) if measurement is not None else None
        if worst is not None:
            found.append((worst, setting.name))
    return max(found, key=lambda pair: pair[0].value, default=None)


def _suspected(report: Report) -> Fact:
    label = "Class under suspicion"
    named = sorted({s.target_class for s in report.suspects if s.target_class is not None})
    if not report.suspects:
        return Fact(label, "not looked for", "no locator ran")
    if not named:
        heard = [suspect for suspect in report.suspects if suspect.judged]
        silent = len(report.suspects) - len(heard)
        views = f"{plural(len(heard), 'view')} of the weights"
        if not heard:
            return Fact(label, "not known", f"{plural(silent, 'view')} of the weights, none judged")
        return Fact(label, "none", f"{views}, {silent} not judged" if silent else views)
    done = report.purification
    treated = [c for c in named if done is not None and c in done.target_classes]
    left = [c for c in named if c not in treated]
    notes = [f"purified: {_labels(report, treated)}"] if treated else []
    notes += [f"not purified: {_labels(report, left)}"] if left else []
    return Fact(label, _labels(report, named), "; ".join(notes))


def _labels(report: Report, classes: Sequence[int]) -> str:
    return ", ".join(class_label(report, c) for c in classes)


def _searched(report: Report) -> Fact:
    known = plural(len(report.evidence.known_triggers), "known trigger")
    search = report.evidence.trigger_search
    unknown = "unknown ones not searched for" if search == "none" else f"unknown ones: {search}"
    return Fact("Evidence", known, unknown)


def overridden(report: Report) -> str:
    """`purify: off, seed: 5`: what flags and environment said instead of the policy's text."""
    return ", ".join(
        f"{key}: {'off' if value is None else plain(value)}"
        for key, value in sorted(report.overrides.items())
    )


def unjudged(suspect: Suspect) -> str:
    """Why a locator's silence on a setting says nothing, empty when it does."""
    if UNREAD in suspect.evidence:
        return "could not read the weights"
    return "did not judge, the model having collapsed," if suspect.evidence.get(COLLAPSED) else ""


def locator_lines(report: Report) -> tuple[str, ...]:
    """One line per locator and answer: who names which class where."""
    answers: dict[tuple[str, str], list[str]] = {}
    for suspect in report.suspects:
        if suspect.target_class is not None:
            answer = f"names {class_label(report, suspect.target_class)}"
        else:
            answer = unjudged(suspect) or "names no class"
        answers.setdefault((suspect.locator, answer), []).append(suspect.setting)
    return tuple(
        f"{locator} {answer} on {', '.join(settings)}." for (locator, answer), settings in answers.items()
    )


def disagreement(report: Report) -> str:
    """Where the locators do not agree, and who says what there; empty where they do."""
    places: dict[str, list[str]] = {}
    for dispute in report.disagreements:
        said = "; ".join(
            f"{locator} names {'no class' if c is None else class_label(report, c)}"
            for locator, c in dispute.named.items()
        )
        places.setdefault(said, []).append(dispute.setting)
    return " ".join(
        f"The locators disagree on {', '.join(settings)}: {said}." for said, settings in places.items()
    )


def wakes_when_compressed(report: Report) -> str:
    """Says that a class is named only after compression, which is what a conditional backdoor looks like."""
    plain = {setting.name for setting in report.settings if not setting.steps} | {"subject"}
    lines = []
    for locator in dict.fromkeys(suspect.locator for suspect in report.suspects):
        mine = [s for s in report.suspects if s.locator == locator and s.scores]
        asleep = {s.target_class for s in mine if s.setting in plain}
        woken = sorted({s.target_class for s in mine if s.target_class is not None} - asleep)
        if asleep and woken:
            lines.append(
                f"{locator} names {_labels(report, woken)} only after compression, "
                "as a conditional backdoor would have it."
            )
    return " ".join(lines)


def purification_line(report: Report) -> str:
    """What the purifier did."""
    done = report.purification
    if as_received(report):
        return "Nothing was purified: a file of another tool is judged as it is."
    if done is None:
        return "Nothing was purified: the purified lane is the model as it was handed in."
    targets = _labels(report, done.target_classes)
    return f"{done.kind} against {targets}, {plural(len(done.history), 'epoch')}, {done.seconds:.1f} s."


def ladder_lines(report: Report) -> tuple[str, ...]:
    """One line per purifier that was tried, where the policy names several."""
    lines = []
    for rung in report.purification.rungs if report.purification else ():
        said = f"left, {plural(len(rung.broken), 'rule')} broken" if rung.broken else "held"
        if rung.kept and rung.broken:
            said = f"kept as the least faulty, {plural(len(rung.broken), 'rule')} broken"
        first = f"; {rung.broken[0]}" if rung.broken else ""
        lines.append(f"{rung.kind} against {_labels(report, rung.target_classes)}: {said}{first}")
    return tuple(lines)


def released_files(report: Report) -> tuple[Artifact, ...]:
    """What ships when the verdict approves."""
    shipped = (setting.purified.artifact for setting in report.settings if setting.released)
    return tuple(artifact for artifact in shipped if artifact is not None)


def shipped_name(artifact: Artifact) -> str:
    """What the file is called in a release."""
    return f"{artifact.setting}{artifact.path.suffix}"


def numbers(finding: Finding) -> str:
    """Observed, bound, limit, n and samples still needed, as far as the finding has them."""
    parts = [
        f"{name} {value:.4g}"
        for name, value in (
            ("observed", finding.observed),
            ("bound", finding.bound),
            ("limit", finding.limit),
        )
        if value is not None
    ]
    parts += [f"n {finding.n}"] if finding.n else []
    parts += [f"needs n {finding.needed}"] if finding.needed is not None else []
    return ", ".join(parts)


def inline(mapping: Mapping[str, object]) -> str:
    """A mapping on one line."""
    return ", ".join(f"{key} {plain(value)}" for key, value in mapping.items())


def plain(value: object) -> str:
    """A parameter in words; a tuple reads as the list that it is once report.json was read again."""
    if isinstance(value, Mapping):
        return f"{{{inline(value)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    return str(value)


def lanes_title(report: Report) -> str:
    """What the table of settings is called."""
    return "Measured as received" if as_received(report) else "Purified beside original"
