"""Exact one-sided Clopper–Pearson bounds on counts, and how many samples a bound would need.

Bounds are beta quantiles (Clopper & Pearson 1934), so they hold at every n and at zero hits. Counts may be
fractional: `needed` asks what the same *rates* would show on more samples.
"""

from __future__ import annotations

from collections.abc import Callable

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
