"""One number against one limit: exact bound, the samples still needed, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from secure_export import statistics
from secure_export.records.measured import Count, Paired

TOO_FEW = "too few samples"


class Limit(Protocol):
    """What a rule demands of a reading; exactly one side is limited."""

    @property
    def metric(self) -> str: ...
    @property
    def at_least(self) -> float | None: ...
    @property
    def limit(self) -> float: ...


@dataclass(frozen=True)
class Reading:
    """One number that a rule looks at, and what it says; the worst reading speaks for the rule."""

    where: str
    value: Count | Paired | float | None
    n: int
    observed: float | None = None
    bound: float | None = None
    passed: bool | None = None
    needed: int | None = None
    why: str = ""


def decide(reading: Reading, rule: Limit, alpha: float) -> Reading:
    """The reading with `observed`, `bound`, `passed`, and `needed` or `why` where it is undecided.

    Counts pass when their exact one-sided bound at error `alpha` lies on the right side of the limit, break
    when the observed rate itself lies on the wrong side, and are undecided between: `passed` is None and
    `needed` the samples that would decide at this rate, if any number would. A plain number is its own bound.
    """
    value, limit, at_most = reading.value, rule.limit, rule.at_least is None
    if isinstance(value, float | int):
        if reading.n == 0:
            return replace(reading, why="no samples")
        return replace(reading, observed=value, passed=value <= limit if at_most else value >= limit)
    if value is None or not possible(value):
        return replace(reading, why="not measured" if value is None else "the counts are impossible")

    def bound(n: int) -> float:
        scale = n / value.total if value.total else 0.0
        if isinstance(value, Paired):
            return statistics.paired_upper(value.gained * scale, value.lost * scale, n, alpha)
        hits = value.hits * scale if value.total else float(0 if at_most else n)
        return statistics.upper(hits, n, alpha) if at_most else statistics.lower(hits, n, alpha)

    def holds(n: int) -> bool:
        return bound(n) <= limit if at_most else bound(n) >= limit

    if value.total == 0:
        return replace(reading, needed=statistics.needed(holds, 0), why="no samples")
    observed = value.difference if isinstance(value, Paired) else value.rate
    violated = observed > limit if at_most else observed < limit
    if violated or holds(value.total):
        return replace(reading, observed=observed, bound=bound(value.total), passed=not violated)
    return replace(
        reading,
        observed=observed,
        bound=bound(value.total),
        needed=statistics.needed(holds, value.total),
        why=TOO_FEW,
    )


def possible(value: Count | Paired) -> bool:
    """Whether counts can be counts: none below zero, no more than the total."""
    parts = (value.hits,) if isinstance(value, Count) else (value.gained, value.lost)
    return min(parts) >= 0 and sum(parts) <= value.total


def severity(reading: Reading, rule: Limit) -> tuple[int, float]:
    """Broken before undecided before kept; then by distance to the limit, or by the samples still needed."""
    sign = 1 if rule.at_least is None else -1
    if reading.passed is None:
        return 1, float("inf") if reading.needed is None else reading.needed
    seen = reading.bound if reading.passed and reading.bound is not None else reading.observed
    return (0 if reading.passed else 2), sign * ((seen or 0.0) - rule.limit)


def message(reading: Reading, rule: Limit) -> str:
    """One decided reading in words: `lift 0.02 = (40 - 20) of 1000 (probe patch), exact bound 0.03: holds at
    most 0.05`."""
    value, where = reading.value, f" ({reading.where})" if reading.where else ""
    if reading.observed is None:
        enough = f", needs at least {reading.needed}" if reading.needed else ""
        return f"{rule.metric}{where}: {reading.why}{enough}"
    if isinstance(value, Count):
        counts = f" = {value.hits} of {value.total}"
    elif isinstance(value, Paired):
        counts = f" = ({value.gained} - {value.lost}) of {value.total}"
    else:
        counts = ""
    limit = f"{'at most' if rule.at_least is None else 'at least'} {rule.limit:g}"
    text = f"{rule.metric} {reading.observed:.4g}{counts}{where}"
    if reading.bound is not None:
        text += f", exact bound {reading.bound:.4g}"
    if reading.passed is not None:
        return f"{text}: {'holds' if reading.passed else 'breaks'} {limit}"
    if reading.why != TOO_FEW:
        return f"{text}: {reading.why} to show {limit}"
    enough = f"needs {reading.needed}" if reading.needed else "no number of samples at this rate would do"
    return f"{text}: {reading.why} to show {limit}, {enough}"
