"""The searches for unknown triggers as rows: what was searched, how hard, what was found, what was not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from secure_export.records.reported import Report
from secure_export.records.searches import Aim, FoundTrigger, Rounding, Search
from secure_export.report._tables import class_label, differing, percent, points
from secure_export.words import plural

MODES = {"cold": "from nothing", "replay": "replay of the original's", "warm": "on from the original's"}
HEADER = ("setting", "lane", "probe", "budget", "effort", "best found", "seconds")
ROUNDING_HEADER = ("setting", "lane", "layers", "KS", "edge", "z", "p", "extrapolation")


@dataclass(frozen=True)
class Row:
    """One search; `cells` stand under HEADER."""

    cells: tuple[str, ...]
    picture: str = ""
    """PNG, base64."""


def search_rows(report: Report) -> tuple[Row, ...]:
    """Every search that could be made."""
    return tuple(_row(report, search) for search in report.evidence.searches if not search.unsearched)


def _row(report: Report, search: Search) -> Row:
    return Row(
        (
            search.setting,
            search.lane,
            f"{search.probe}, {MODES[search.mode]}",
            search.budget,
            _effort(search),
            _found(report, search),
            f"{search.seconds:.1f}",
        ),
        next((found.picture for found in search.found if found.picture), ""),
    )


def best_of(search: Search) -> FoundTrigger | None:
    """The trigger with the largest contrast on the holdout, or lift where the probe makes no contrast."""
    scored = [found for found in search.found if found.lift is not None]
    return max(scored, key=_strength, default=None)


def _strength(found: FoundTrigger) -> float:
    reading = found.contrast or found.lift
    return reading.difference if reading else -1.0


def _effort(search: Search) -> str:
    if search.mode == "replay":
        return plural(len(search.found), "trigger")
    done = (
        f"{search.steps} steps"
        if search.steps == search.planned
        else f"{search.steps} of {search.planned} steps"
    )
    how = "gradients" if search.gradient else "queries only"
    agreement = f", twin agrees on {percent(search.agreement.rate)}" if search.agreement else ""
    return f"{done}, {how}, {search.extent}, {search.forwards:,} samples{agreement}"


def _found(report: Report, search: Search) -> str:
    best = best_of(search)
    if best is None or best.lift is None:
        return "nothing scored"
    label = _label(report, best.aim)
    origin = f", found on {best.origin}" if best.origin else ""
    if best.contrast is not None:
        origin += f"; {points(best.contrast.difference)} above a reference that forgot"
    if search.excess is not None and search.excess_class is not None:
        above = f"{points(search.excess)} above {search.references} clean references"
        origin += f"; {above} into {_label(report, Aim(search.excess_class, search.excess_source))}"
        origin += f", p {search.p:.2f}" if search.p is not None else ""
    return f"{points(best.lift.difference)} lift into {label} ({differing(best.lift).count}){origin}"


def _label(report: Report, aim: Aim) -> str:
    label = class_label(report, aim.into)
    return label if aim.source is None else f"{label} from {class_label(report, aim.source)} alone"


def gaps(report: Report) -> tuple[str, ...]:
    """What was not searched, and why; the same reason once."""
    found: dict[str, list[str]] = {}
    for search in report.evidence.searches:
        if search.unsearched:
            found.setdefault(search.unsearched, []).append(f"{search.lane} {search.setting} ({search.probe})")
    for rounding in report.evidence.roundings:
        if rounding.unsearched:
            found.setdefault(rounding.unsearched, []).append(f"{rounding.lane} {rounding.setting} (rounding)")
    return tuple(f"{', '.join(dict.fromkeys(where))}: {why}" for why, where in found.items())


def rounding_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """Every quantized file whose rounding was read, under ROUNDING_HEADER."""
    return tuple(_rounding_rows(report))


def _rounding_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for rounding in report.evidence.roundings:
        if rounding.layers:
            yield (
                rounding.setting,
                rounding.lane,
                str(rounding.layers),
                "–" if rounding.ks is None else f"{rounding.ks:.1f}",
                "–" if rounding.edge is None else f"{rounding.edge:.2f}",
                f"{rounding.z:+.1f}",
                f"{rounding.p:.2f} ({rounding.draws} draws)",
                _extrapolation(report, rounding),
            )


def _extrapolation(report: Report, rounding: Rounding) -> str:
    shares = ", ".join(percent(share) for share in rounding.top_shares)
    if rounding.target_class is None:
        return f"no class ({shares})"
    return f"into {class_label(report, rounding.target_class)} ({shares})"
