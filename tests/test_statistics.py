"""Exact bounds: against scipy's own intervals, against the exact binomial law, and their order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from secure_export.statistics import LARGEST, lower, needed, paired_upper, upper

ALPHAS = st.sampled_from([0.1, 0.05, 0.01, 0.005, 0.0005])


@st.composite
def counts(draw: st.DrawFn, largest: int = 5000) -> tuple[int, int]:
    total = draw(st.integers(1, largest))
    return draw(st.integers(0, total)), total


@given(counts(), ALPHAS)
def test_bounds_are_those_of_scipys_exact_interval(count: tuple[int, int], alpha: float) -> None:
    hits, total = count
    interval = binomtest(hits, total).proportion_ci(confidence_level=1 - 2 * alpha, method="exact")
    assert upper(hits, total, alpha) == pytest.approx(interval.high, abs=1e-9)
    assert lower(hits, total, alpha) == pytest.approx(interval.low, abs=1e-9)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("total", [10, 59, 300])
def test_bounds_cover_the_true_rate_as_often_as_they_say(rate: float, total: int) -> None:
    missed = [hits for hits in range(total + 1) if upper(hits, total, 0.05) < rate]
    assert sum(binom.pmf(hits, total, rate) for hits in missed) <= 0.05
    missed = [hits for hits in range(total + 1) if lower(hits, total, 0.05) > rate]
    assert sum(binom.pmf(hits, total, rate) for hits in missed) <= 0.05


@given(counts(), ALPHAS)
def test_estimate_lies_between_its_bounds(count: tuple[int, int], alpha: float) -> None:
    hits, total = count
    assert 0 <= lower(hits, total, alpha) <= hits / total <= upper(hits, total, alpha) <= 1


@given(counts(1000), ALPHAS, st.integers(2, 20))
def test_more_samples_at_the_same_rate_never_widen_a_bound(
    count: tuple[int, int], alpha: float, times: int
) -> None:
    hits, total = count
    assert upper(times * hits, times * total, alpha) <= upper(hits, total, alpha) + 1e-12
    assert lower(times * hits, times * total, alpha) >= lower(hits, total, alpha) - 1e-12


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, int]:
    total = draw(st.integers(1, 2000))
    gained = draw(st.integers(0, total))
    return gained, draw(st.integers(0, total - gained)), total


@given(pairs(), ALPHAS)
def test_paired_bound_is_never_below_the_difference(pair: tuple[int, int, int], alpha: float) -> None:
    gained, lost, total = pair
    assert (gained - lost) / total <= paired_upper(gained, lost, total, alpha) <= 1


def test_paired_bound_shares_alpha_between_its_two_rates() -> None:
    assert paired_upper(5, 3, 100, 0.05) == upper(5, 100, 0.025) - lower(3, 100, 0.025)


def test_paired_bound_covers_the_true_difference() -> None:
    total, gains, losses, missed = 40, 0.1, 0.2, 0.0
    for gained in range(total + 1):
        for lost in range(total + 1 - gained):
            if paired_upper(gained, lost, total, 0.05) < gains - losses:
                kept = total - gained - lost
                ways = math.comb(total, gained) * math.comb(total - gained, lost)
                missed += ways * gains**gained * losses**lost * (1 - gains - losses) ** kept
    assert missed <= 0.05


def test_no_samples_say_nothing() -> None:
    assert (upper(0, 0, 0.05), lower(0, 0, 0.05), paired_upper(0, 0, 0, 0.05)) == (1, 0, 1)


@pytest.mark.parametrize(("limit", "expected"), [(0.05, 59), (0.01, 299), (0.5, 5)])
def test_needed_for_zero_hits_is_the_known_number(limit: float, expected: int) -> None:
    assert needed(lambda n: upper(0, n, 0.05) <= limit, 0) == expected


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_needed_is_the_smallest(start: int, more: int) -> None:
    assert needed(lambda n: n >= start + more, start) == start + more


def test_needed_gives_up_where_no_number_is_enough() -> None:
    asked: list[int] = []
    assert needed(lambda n: asked.append(n) is not None, 10) is None
    assert max(asked) == LARGEST
