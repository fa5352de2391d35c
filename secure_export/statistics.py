"""Exact one-sided Clopper–Pearson bounds on counts, and how many samples a bound would need.

Bounds are beta quantiles (Clopper & Pearson 1934), so they hold at every n and at zero hits. Counts may be
fractional: `needed` asks what the same *rates* would show on more samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

LARGEST = 1_000_000_000
"""Where `needed` stops looking: a rate that needs more samples than this sits on its limit."""


def upper(hits: float, total: float, alpha: float) -> float:
    """Largest rate that `hits` of `total` leaves possible at one-sided level 1 - alpha; 1 if total is 0."""
    from scipy.special import betainccinv

    return 1.0 if hits >= total else float(betainccinv(hits + 1, total - hits, alpha))


def lower(hits: float, total: float, alpha: float) -> float:
    """Smallest rate that `hits` of `total` leaves possible at one-sided level 1 - alpha; 0 if total is 0."""
    from scipy.special import betaincinv

    return 0.0 if hits <= 0 else float(betaincinv(hits, total - hits + 1, alpha))


def paired_upper(gained: float, lost: float, total: float, alpha: float) -> float:
    """Upper bound on P(gained) - P(lost) of the same `total` samples, at level 1 - alpha.

    Each of the two rates gets alpha / 2 (Bonferroni), whatever their dependence.
    """
    return upper(gained, total, alpha / 2) - lower(lost, total, alpha / 2)


def needed(holds: Callable[[int], bool], start: int) -> int | None:
    """Smallest n > `start` for which `holds(n)`, taken as monotonic; None when LARGEST is not enough."""
    low, high = start, max(2 * start, 1)
    while not holds(high):
        if high >= LARGEST:
            return None
        low, high = high, min(2 * high, LARGEST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def conformal_p(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Conformal p-value of the last row against the N of clean models, and the class that stands out.

    `rows` is [N + 1][classes]: one score per class and model.

    A model's score is its largest excess over the median of all other models, class by class, for some
    classes are easier to reach than others. If the last model is clean too, all rows are exchangeable, so
    p <= a has a probability of at most a, and p is never below 1 / (N + 1) (Vovk et al. 2005).
    """
    scored = [excess(rows, i) for i in range(len(rows))]
    own, named = scored[-1]
    return sum(score >= own for score, _ in scored) / len(rows), named


def excess(rows: Sequence[Sequence[float]], i: int) -> tuple[float, int]:
    """(largest, its class): how far row i lies above the median of all other rows, class by class."""
    others = [row for j, row in enumerate(rows) if j != i]
    above = [value - median(row[c] for row in others) for c, value in enumerate(rows[i])]
    return max((value, c) for c, value in enumerate(above))
