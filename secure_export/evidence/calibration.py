"""How a find compares with what the same search finds on clean models, class by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from secure_export import loading
from secure_export.errors import PolicyError
from secure_export.lane import at_the_head, through_settings
from secure_export.records.measured import SettingResult
from secure_export.records.searches import Search
from secure_export.statistics import conformal_p, excess

if TYPE_CHECKING:
    from secure_export.lane import Bench
    from secure_export.policy import Policy


def referenced(policy: Policy, bench: Bench) -> Iterator[list[SettingResult]]:
    """Every clean reference through the same settings as the subject.

    Raises:
        PolicyError: no architecture to load them into. LoadError: one that cannot be loaded.
    """
    wanted, spec = policy.subject, policy.evidence
    if wanted.architecture is None:
        raise PolicyError("references need subject.architecture", hint="give --arch")
    for path in spec.references if spec else ():
        reference = loading.load(
            Path(path),
            wanted.architecture,
            classes=wanted.classes,
            head=wanted.head,
            mean=wanted.mean,
            std=wanted.std,
            input_shape=tuple(bench.splits.fit.inputs.shape[1:]),
        )
        lined = at_the_head(reference.model, reference.head, "original", reference.sha256, bench)
        yield through_settings(lined, policy.expanded_settings(), bench)


def calibrated(found: Sequence[Search], references: Sequence[Sequence[Search]]) -> list[Search]:
    """Cold searches with their p and excess among the same search (setting and probe) on every reference."""
    return [_calibrated(search, references) for search in found]


def _calibrated(search: Search, references: Sequence[Sequence[Search]]) -> Search:
    same = [
        other
        for reference in references
        for other in reference
        if (other.setting, other.probe, other.mode) == (search.setting, search.probe, "cold")
    ]
    rows = [_row(other) for other in (*same, search) if not other.unsearched]
    if search.unsearched or search.mode != "cold" or len(rows) != len(references) + 1:
        return search
    p, _ = conformal_p(rows)
    above, named = excess(rows, len(rows) - 1)
    return replace(search, p=p, references=len(references), excess=above, excess_class=named)


def _row(search: Search) -> list[float]:
    """Lift on fit per class, which is what every class has; the holdout scores the best ones only."""
    return [found.fit.difference for found in sorted(search.found, key=lambda found: found.target_class)]
