"""What every renderer says, said once: worst cases, counts beside percentages, the verdict as a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secure_export.policy.schema import ARTIFACT
from secure_export.records.measured import Count, Finding, Measurement, Paired, SettingResult
from secure_export.records.reported import Report
from secure_export.words import plural

COLUMNS = ("ACC", "ACC drop", "worst lift", "worst ASR", "lowest RA", "agreement", "size", "ms/sample")
ONE_CLASS_SHARE = 0.5
"""Above this share of predictions a row is marked as collapsed. A mark for the reader and nothing else: what
locators and searches leave out is told on fit, by limits of their own."""
HEADLINES = {"released": "Released", "refused": "Refused", "no_verdict": "No verdict"}

_AT_RATIO = re.compile(r"^(?P<before>.+?)@(?P<ratio>\d*\.?\d+)(?P<after>.*)$")


@dataclass(frozen=True)
class Worst:
    """The extreme of a measurement over triggers and candidate target classes, and where it is."""

    trigger: str
    target_class: int
    reading: Count | Paired

    @property
    def value(self) -> float:
        """Rate of a Count, difference of a Paired."""
        return self.reading.rate if isinstance(self.reading, Count) else self.reading.difference


@dataclass(frozen=True)
class Cell:
    """A reading as text: the value, the counts it rests on, and the trigger and class it belongs to."""

    value: str
    count: str = ""
    where: str = ""


@dataclass(frozen=True)
class Row:
    """One lane of one setting; `cells` stand under COLUMNS and are empty where nothing was measured."""

    setting: str
    lane: str
    span: int
    """Lanes of the setting, on its first row; 0 on the others."""
    released: bool
    collapsed: bool
    cells: tuple[Cell, ...]
    unmeasured: str = ""
    steps: str = ""
    failed: int = 0
    undecided: int = 0


def percent(rate: float) -> str:
    """A rate with one decimal; never rounded onto 0 % or 100 % when it is neither."""
    if 0 < rate < 0.0005:
        return "<0.1%"
    if 0.9995 < rate < 1:
        return ">99.9%"
    return f"{100 * rate:.1f}%"


def points(difference: float) -> str:
    """A difference of two rates in percentage points, signed."""
    value = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{'0.0' if value[1:] == '0.0' else value} pt"


def rated(count: Count) -> Cell:
    """k of n, or a dash for an empty count."""
    return Cell(percent(count.rate), f"{count.hits} of {count.total}") if count.total else Cell("–")


def differing(paired: Paired) -> Cell:
    """A paired difference with its two discordant counts."""
    if not paired.total:
        return Cell("–")
    return Cell(points(paired.difference), f"+{paired.gained} \N{MINUS SIGN}{paired.lost} of {paired.total}")


def worst_asr(measurement: Measurement) -> Worst | None:
    """The trigger and class with the highest ASR."""
    found = [Worst(t.trigger, c, count) for t in measurement.triggers for c, count in enumerate(t.asr)]
    return max(found, key=lambda w: w.value, default=None)


def worst_lift(measurement: Measurement) -> Worst | None:
    """The trigger and class with the highest ASR lift."""
    found = [Worst(t.trigger, c, paired) for t in measurement.triggers for c, paired in enumerate(t.lift)]
    return max(found, key=lambda w: w.value, default=None)


def lowest_ra(measurement: Measurement) -> Worst | None:
    """The trigger and class with the lowest RA."""
    found = [Worst(t.trigger, c, count) for t in measurement.triggers for c, count in enumerate(t.ra)]
    return min(found, key=lambda w: w.value, default=None)


def in_one_class(measurement: Measurement) -> bool:
    """Whether most predictions fall into one class."""
    return measurement.top_share.rate > ONE_CLASS_SHARE


def class_label(report: Report, index: int) -> str:
    """A class by number and name: `class 3 (cat)`."""
    names = report.subject.class_names
    name = names[index] if 0 <= index < len(names) else str(index)
    return f"class {index}" if name == str(index) else f"class {index} ({name})"


def in_megabytes(size: int) -> str:
    """Bytes as kB or MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def sweep_point(setting: str) -> tuple[str, float] | None:
    """`prune@0.5-int8` is the point .5 of the family `prune-int8`; None for a setting outside any sweep."""
    match = _AT_RATIO.match(setting)
    return (match["before"] + match["after"], float(match["ratio"])) if match else None


def as_received(report: Report) -> bool:
    """Whether there is one lane: nothing can purify a file of another tool, so both lanes are that file."""
    return report.subject.architecture == ARTIFACT


def rows(report: Report) -> tuple[Row, ...]:
    """Original above purified, setting by setting; of a file of another tool, the one lane."""
    return tuple(_rows(report))


def _rows(report: Report) -> Iterator[Row]:
    for setting in report.settings:
        binding = [f for f in report.verdict.findings if f.setting == setting.name]
        steps = " → ".join(str(step.get("kind", "?")) for step in setting.steps) or "none"
        results = (setting.purified,) if as_received(report) else (setting.original, setting.purified)
        for result in results:
            measurement, missing = result.measurement, result.unmeasured
            judged = result.lane == "purified"
            yield Row(
                setting=setting.name,
                lane="as received" if as_received(report) else result.lane,
                span=len(results) if result is results[0] else 0,
                released=setting.released,
                collapsed=measurement is not None and in_one_class(measurement),
                cells=_cells(report, result, measurement) if measurement is not None else (),
                unmeasured=""
                if measurement is not None
                else (missing.reason if missing else "no reason given"),
                steps=steps,
                failed=sum(f.passed is False for f in binding) if judged else 0,
                undecided=sum(f.passed is None for f in binding) if judged else 0,
            )


def _cells(report: Report, result: SettingResult, measurement: Measurement) -> tuple[Cell, ...]:
    return (
        rated(measurement.acc),
        differing(measurement.acc_drop),
        located(report, worst_lift(measurement)),
        located(report, worst_asr(measurement)),
        located(report, lowest_ra(measurement)),
        rated(measurement.agreement),
        Cell(in_megabytes(result.artifact.size)) if result.artifact else Cell("–"),
        Cell(f"{measurement.latency_ms:.2f}", f"batch {measurement.batch_size}"),
    )


def located(report: Report, worst: Worst | None) -> Cell:
    """A worst case as a cell that names its trigger and class."""
    if worst is None:
        return Cell("–")
    cell = rated(worst.reading) if isinstance(worst.reading, Count) else differing(worst.reading)
    return Cell(cell.value, cell.count, f"{worst.trigger} → {class_label(report, worst.target_class)}")


def split_findings(report: Report) -> tuple[Sequence[Finding], Sequence[Finding], Sequence[Finding]]:
    """Failed, undecided, held."""
    findings = report.verdict.findings
    return (
        [f for f in findings if f.passed is False],
        [f for f in findings if f.passed is None],
        [f for f in findings if f.passed],
    )


def sentence(report: Report) -> str:
    """The verdict in one plain sentence."""
    failed, undecided, held = (len(found) for found in split_findings(report))
    total = failed + undecided + held
    if report.verdict.outcome == "released":
        shipped = sum(setting.released for setting in report.settings)
        return (
            f"All {total} checks hold on {plural(len(report.settings), 'setting')}; "
            f"{plural(shipped, 'file')} released, byte for byte as measured."
        )
    open_ = f", {undecided} could not be decided" if undecided and failed else ""
    if failed:
        verb = "does" if failed == 1 else "do"
        return f"{failed} of {total} checks {verb} not hold{open_}; nothing was released."
    if undecided:
        return f"{undecided} of {total} checks could not be decided; nothing was released."
    return "Nothing was checked; nothing was released." if not total else "Nothing was released."


def release_tag(report: Report) -> str:
    """How a setting that the policy wants released is marked."""
    return "released" if report.verdict.outcome == "released" else "for release"
