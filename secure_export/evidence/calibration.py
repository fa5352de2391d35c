"""How a find compares with what the same search finds on clean models, class by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from secure_export import digests, loading
from secure_export.errors import PolicyError
from secure_export.lane import at_the_head, through_settings
from secure_export.records.measured import SettingResult
from secure_export.records.searches import Search
from secure_export.statistics import conformal_p, excess

if TYPE_CHECKING:
    from secure_export.lane import Bench, Lined
    from secure_export.policy import Policy
    from secure_export.records.memory import Subject


def check_references(policy: Policy, original: Lined | None, bench: Bench) -> None:
    """References are models of their own: the subject beside itself shows nothing, and one counts once.

    Raises:
        PolicyError: two of them, or one and the subject, have the same weights; or no architecture to load
            them into. LoadError: one that cannot be loaded.
    """
    seen = {digests.of_state(original.model.state_dict()): "the model under test"} if original else {}
    for path, reference in loaded(policy, bench):
        weights = digests.of_state(reference.model.state_dict())
        if weights in seen:
            raise PolicyError(
                f"the reference {path} has the weights of {seen[weights]}",
                hint="references are clean models that were trained apart, each named once",
            )
        seen[weights] = f"the reference {path}"


def referenced(policy: Policy, bench: Bench) -> Iterator[list[SettingResult]]:
    """Every clean reference through the same settings as the subject."""
    for _, reference in loaded(policy, bench):
        lined = at_the_head(reference.model, reference.head, "original", reference.identity, bench)
        yield through_settings(lined, policy.expanded_settings(), bench)


def loaded(policy: Policy, bench: Bench) -> Iterator[tuple[str, Subject]]:
    """The clean references, one at a time."""
    wanted, spec = policy.subject, policy.evidence
    for path in spec.references if spec else ():
        shape = tuple(bench.splits.fit.inputs.shape[1:])
        yield Path(path).name, loading.as_named(Path(path), wanted, shape)


def calibrated(found: Sequence[Search], references: Sequence[Sequence[Search]]) -> list[Search]:
    """Searches with their excess, and cold ones with p, among the same search on every reference.

    The same is: setting, probe and mode, and for what goes on from known triggers the same triggers.
    """
    return [_calibrated(search, references) for search in found]


def _calibrated(search: Search, references: Sequence[Sequence[Search]]) -> Search:
    same = [
        other
        for reference in references
        for other in reference
        if (other.setting, other.probe, other.mode) == (search.setting, search.probe, search.mode)
    ]
    rows = [_lifts(other) for other in (*same, search) if not other.unsearched]
    if search.unsearched or len(rows) != len(references) + 1:
        return search
    above, column = excess(rows, len(rows) - 1)
    # A known trigger was found on the subject and on no reference: the models are not exchangeable.
    p = conformal_p(rows)[0] if search.mode == "cold" else None
    into, source = search.found[column].aim
    return replace(
        search, p=p, references=len(references), excess=above, excess_class=into, excess_source=source
    )


def _lifts(search: Search) -> list[float]:
    """Of every trigger in the order of the search: known ones on the holdout, where all of them are scored.

    A cold search has one for every class on fit alone.
    """
    counted = (
        found.fit if found.lift is None or search.mode == "cold" else found.lift for found in search.found
    )
    return [lift.difference for lift in counted]
