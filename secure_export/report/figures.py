"""The report's figures: sweeps, localization scores and the purification's history, each as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from secure_export.records.measured import MIN_SCORE, Lane, Measurement, Suspect
from secure_export.records.reported import Report, ReportedSetting
from secure_export.report import _tables as tables
from secure_export.report._canvas import INK, LIMIT, LINE, MUTED, ORIGINAL, PURIFIED, SHADE, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 24
MOST_BARS = 20
SERIES = {
    "margin": "margin of the suspected class",
    "fit_acc": "all samples of fit",
    "target_acc": "those of the suspected class",
}
"""What the series of a purifier's history are called in the figure."""


@dataclass(frozen=True)
class Drawing:
    """One figure and what it shows in words."""

    svg: str
    caption: str


@dataclass(frozen=True)
class _Reading:
    """One panel of a sweep: what is read from a measurement, and which rule limits it."""

    title: str
    rule: str
    read: Callable[[Measurement], float | None]


_READINGS = (
    _Reading("ACC", "acc", lambda m: m.acc.rate),
    _Reading("worst ASR", "asr", lambda m: _value(tables.worst_asr(m))),
    _Reading("worst ASR lift", "lift", lambda m: _value(tables.worst_lift(m))),
)


def _value(worst: tables.Worst | None) -> float | None:
    return None if worst is None else worst.value


def sweeps(report: Report) -> tuple[Drawing, ...]:
    """ACC, worst ASR and worst lift against the ratio, one figure per swept family of settings."""
    families: dict[str, dict[float, ReportedSetting]] = {}
    for setting in report.settings:
        if (point := tables.sweep_point(setting.name)) is not None:
            families.setdefault(point[0], {})[point[1]] = setting
    return tuple(
        Drawing(
            drawn(f"sweep-{index}", 10.2, 2.75, lambda figure, p=points: _sweep(figure, report, p)),  # type: ignore[misc]
            f"Sweep of {family}: original dashed, purified solid, a cross where the model has collapsed "
            "onto one class, dotted the policy's limit (rules read the exact bound, not the point).",
        )
        for index, (family, points) in enumerate(families.items())
    )


def _sweep(figure: Figure, report: Report, points: Mapping[float, ReportedSetting]) -> None:
    ratios = sorted(points)
    panels = figure.subplots(1, len(_READINGS), sharex=True)
    for axes, reading in zip(panels, _READINGS, strict=True):
        axes.set_title(reading.title)
        axes.set_xlabel("ratio")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        for limit, text in _limits(report, reading.rule, list(points.values())):
            axes.axhline(limit, color=LIMIT, linestyle=(0, (1, 1.5)), linewidth=1.2)
            axes.annotate(text, (1, limit), xycoords=("axes fraction", "data"), color=LIMIT, fontsize=7.5,
                          xytext=(0, 3), textcoords="offset points", ha="right")  # fmt: skip
        _curve(axes, ratios, points, "original", reading)
        _curve(axes, ratios, points, "purified", reading)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8.5)


def _curve(
    axes: Axes,
    ratios: Sequence[float],
    points: Mapping[float, ReportedSetting],
    lane: Lane,
    reading: _Reading,
) -> None:
    values: list[float] = []
    fallen: list[bool] = []
    for ratio in ratios:
        measurement = getattr(points[ratio], lane).measurement
        value = None if measurement is None else reading.read(measurement)
        values.append(float("nan") if value is None else value)
        fallen.append(measurement is not None and tables.in_one_class(measurement))
    colour, style = (ORIGINAL, (0, (4, 2))) if lane == "original" else (PURIFIED, "solid")
    axes.plot(ratios, values, color=colour, linestyle=style, label=lane, zorder=3)
    for marker, wanted in (("o", False), ("X", True)):
        chosen = [(r, v) for r, v, f in zip(ratios, values, fallen, strict=True) if f is wanted]
        axes.plot(
            *zip(*chosen, strict=True) if chosen else ([], []), marker, color=colour, markersize=5, zorder=4
        )


def _limits(report: Report, rule: str, settings: Sequence[ReportedSetting]) -> list[tuple[float, str]]:
    """Limits of `rule` on these settings; one on the ACC drop stands at the subject's ACC minus it."""
    names = {setting.name for setting in settings}
    found = {}
    for finding in report.verdict.findings:
        if finding.setting not in names or finding.limit is None:
            continue
        if finding.rule == rule:
            found[finding.limit] = f"limit {finding.limit:.2%}"
        elif finding.rule == "acc_drop" and rule == "acc" and (subject := _subject_acc(settings)) is not None:
            found[subject - finding.limit] = f"limit on the drop {finding.limit:.2%}"
    return sorted(found.items())


def _subject_acc(settings: Sequence[ReportedSetting]) -> float | None:
    measured = (s.original.measurement for s in settings)
    return next((m.acc.rate + m.acc_drop.difference for m in measured if m is not None), None)


def localization(report: Report) -> Drawing | None:
    """One small panel of bars per locator and view; views that name a class come first."""
    readable = [s for s in report.suspects if s.scores]
    if not readable:
        return None
    shown = readable
    if len(readable) > MOST_PANELS:
        shown = sorted(readable, key=lambda s: s.target_class is None)[:MOST_PANELS]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    caption = (
        "Scores per class, larger is more suspicious; a named class stands out. Scales differ per panel."
    )
    if any(MIN_SCORE in s.evidence for s in shown):
        caption += " Dotted: the score that naming a class takes, among other things."
    if len(shown) < len(readable):
        caption += f" {len(shown)} of {len(readable)} views are drawn; all are in report.json."
    width, height = 10.2 * columns / 4, 0.25 + 1.65 * lines
    return Drawing(
        drawn("localization", width, height, lambda figure: _panels(figure, report, shown, lines, columns)),
        caption,
    )


def _panels(figure: Figure, report: Report, shown: Sequence[Suspect], lines: int, columns: int) -> None:
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for number, (axes, suspect) in enumerate(zip(panels, shown, strict=False)):
        classes = sorted(range(len(suspect.scores)), key=lambda c: -suspect.scores[c])[:MOST_BARS]
        classes.sort()
        colours = [LIMIT if c == suspect.target_class else MUTED for c in classes]
        axes.bar(range(len(classes)), [suspect.scores[c] for c in classes], color=colours, width=0.7)
        axes.set_xticks(range(len(classes)), [str(c) for c in classes], fontsize=7)
        axes.tick_params(length=0, labelsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.grid(visible=False, axis="x")
        if number % columns == 0:
            axes.set_ylabel("score", fontsize=8)
        if (needed := suspect.evidence.get(MIN_SCORE)) is not None:
            axes.axhline(float(needed), color=LIMIT, linestyle=(0, (1, 1.5)), linewidth=1.2)
        axes.set_title(f"{suspect.locator}, {suspect.setting}", fontsize=8, color=MUTED, pad=15)
        colour = MUTED if suspect.target_class is None else LIMIT
        axes.annotate(_answer(report, suspect), (0, 1), xycoords="axes fraction", xytext=(0, 4),
                      textcoords="offset points", fontsize=8, color=colour)  # fmt: skip


def _answer(report: Report, suspect: Suspect) -> str:
    if suspect.target_class is not None:
        return f"names {tables.class_label(report, suspect.target_class)}"
    return "names no class" if suspect.judged else "not judged"


def history(report: Report) -> Drawing | None:
    """Margins and accuracies over the purifier's epochs, its phases shaded in turn."""
    done = report.purification
    if done is None or not done.history:
        return None
    groups = [keys for word in ("margin", "acc") if (keys := _series(done.history, word))]
    groups = groups or [keys for word in ("loss",) if (keys := _series(done.history, word))]
    if not groups:
        return None
    return Drawing(
        drawn("history", 10.2, 2.9, lambda figure: _history(figure, done.history, groups)),
        f"{done.kind} on the fit split, epoch by epoch; shading marks the phases.{_explained(groups)}",
    )


def _explained(groups: Sequence[Sequence[str]]) -> str:
    if not any("margin" in key for keys in groups for key in keys):
        return ""
    return (
        " Margin: the logit of the suspected class less the largest other one, mean over samples of other "
        "classes; below 0 the class loses."
    )


def _series(epochs: Sequence[Mapping[str, Any]], word: str) -> list[str]:
    keys = dict.fromkeys(
        key for epoch in epochs for key, value in epoch.items() if isinstance(value, int | float)
    )
    return [key for key in keys if word in key and not key.startswith("target_class")]


def _unit(keys: Sequence[str]) -> str:
    if all("margin" in key for key in keys):
        return "margin (logits)"
    return "accuracy" if all("acc" in key for key in keys) else "loss"


def _history(figure: Figure, epochs: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]) -> None:
    steps = range(1, len(epochs) + 1)
    styles = ((PURIFIED, "solid"), (ORIGINAL, (0, (4, 2))), (INK, (0, (1, 1))), (MUTED, "dashdot"))
    for axes, keys in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for number, (phase, members) in enumerate(
            groupby(steps, lambda s: str(epochs[s - 1].get("phase", "")))
        ):
            inside = list(members)
            if number % 2 == 0:
                axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=SHADE, linewidth=0, zorder=0)
            middle = (inside[0] + inside[-1]) / 2
            axes.annotate(phase, (middle, 1), xycoords=("data", "axes fraction"), ha="center",
                          xytext=(0, 3), textcoords="offset points", fontsize=7.5, color=MUTED)  # fmt: skip
        for key, (colour, style) in zip(keys, styles, strict=False):
            values = [float(epoch.get(key, "nan")) for epoch in epochs]
            axes.plot(
                steps,
                values,
                color=colour,
                linestyle=style,
                label=SERIES.get(key, key.replace("_", " ")),
                zorder=3,
            )
        axes.set_xlim(0.5, len(epochs) + 0.5)
        axes.set_xlabel("epoch")
        axes.set_ylabel(_unit(keys))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(visible=False, axis="x")
        if all("acc" in key for key in keys):
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(fontsize=8, loc="best", labelcolor=INK)
        axes.spines["left"].set_color(LINE)
