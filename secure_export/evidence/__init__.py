"""Evidence without the trigger: every file is searched for one, and what was found is tried on the others.

    original files → cold search → the best triggers → replay and warm search on every purified file

Searching sees the fit split only; the holdout scores what was found, by the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from secure_export import digests, registry
from secure_export.errors import CompressError, NoVerdict
from secure_export.evidence.calibration import calibrated, check_references, referenced
from secure_export.evidence.files import opened
from secure_export.evidence.one import Known, Work, best_known, searched
from secure_export.evidence.rounding import reading
from secure_export.lane import unrounded
from secure_export.probes import Probe
from secure_export.records.measured import SettingResult
from secure_export.records.memory import Split
from secure_export.records.searches import Rounding, Search

if TYPE_CHECKING:
    from secure_export.lane import Bench, Lined
    from secure_export.policy import EvidenceSpec, Policy, Setting


@dataclass(frozen=True)
class Gathered:
    """Everything that the policy asked for, done or explained."""

    searches: tuple[Search, ...] = ()
    roundings: tuple[Rounding, ...] = ()


Results = tuple["Lined | None", Sequence[SettingResult]]
"""A lane, and what became of every setting; no lane behind a file that another tool made."""


def gather(policy: Policy, lanes: tuple[Results, Results], classes: int, bench: Bench) -> Gathered:
    """Every search of the policy on every file of the original and the purified lane.

    Raises:
        PolicyError: a clean reference that is none (check_references), or no architecture for it. LoadError:
            a reference that cannot be loaded. What cannot be searched is no error: the search says why.
    """
    if policy.evidence is None:
        return Gathered()
    work = work_of(policy.evidence, classes, bench)
    (original, originals), (_, purifieds) = lanes
    check_references(policy, original, bench)
    found = cold_searches(originals, work)
    spec, settings = policy.evidence, policy.expanded_settings()
    heeded, alpha = any(rule.evident for rule in spec.rules), 1 - policy.confidence
    known = {
        name: best_known(found, probe, work, spec.evident(name, settings, found, alpha) if heeded else ())
        for name, probe in work.probes.items()
    }
    found += cold_searches(purifieds, work)
    if any(map(purified, originals, purifieds)):
        found += tried_again(purifieds, known, work)
    if policy.evidence.references:
        compared = [
            cold_searches(one, work)
            + (tried_again(one, known, work) if policy.evidence.compared_again else [])
            for one in referenced(policy, bench)
        ]
        found = calibrated(found, compared)
    return Gathered(tuple(found), tuple(_roundings(policy, lanes, bench)) if policy.evidence.rounding else ())


def purified(original: SettingResult, result: SettingResult) -> bool:
    """Whether a setting's file is another than the original's; also where there is none to tell by."""
    before, after = original.artifact, result.artifact
    return before is None or after is None or before.sha256 != after.sha256


def work_of(spec: EvidenceSpec, classes: int, bench: Bench) -> Work:
    """The probes of the policy, and the holdout samples that score what they find."""
    probes = [registry.build(Probe, "probes", dict(probe)) for probe in spec.specs]
    holdout, generator = bench.splits.holdout, torch.Generator().manual_seed(bench.seed)
    index = torch.randperm(len(holdout), generator=generator)[: spec.samples]
    scored_on = Split(holdout.inputs[index], holdout.labels[index], holdout.sha256)
    return Work(spec, {probe.name: probe for probe in probes}, classes, bench, scored_on)


def cold_searches(results: Sequence[SettingResult], work: Work) -> list[Search]:
    """Every probe on every file of a lane, from noise."""
    found = []
    for done, result in enumerate(results):
        work.bench.progress(f"search: {result.lane} {result.setting}", done, len(results))
        file = opened(result, work.bench.splits.fit, work.bench.runtime)
        found += [searched(result, file, probe, "cold", (), work) for probe in work.probes.values()]
    return found


def tried_again(
    results: Sequence[SettingResult], known: Mapping[str, Sequence[Known]], work: Work
) -> list[Search]:
    """Known triggers on every file of another lane: as they are, and as a start for a search."""
    found = []
    for done, result in enumerate(results):
        work.bench.progress(f"replay: {result.lane} {result.setting}", done, len(results))
        file = opened(result, work.bench.splits.fit, work.bench.runtime)
        for name, probe in work.probes.items():
            found.append(searched(result, file, probe, "replay", known[name], work))
            if name in work.spec.warmed:
                found.append(searched(result, file, probe, "warm", known[name], work))
    return found


def _roundings(policy: Policy, lanes: tuple[Results, Results], bench: Bench) -> Iterator[Rounding]:
    for lined, results in lanes:
        for setting, result in zip(policy.expanded_settings(), results, strict=True):
            try:
                yield _rounding(lined, setting, result, bench)
            except NoVerdict as error:
                yield Rounding(result.lane, setting.name, unsearched=error.message)


def _rounding(lined: Lined | None, setting: Setting, result: SettingResult, bench: Bench) -> Rounding:
    artifact = result.artifact
    if artifact is None:
        raise CompressError(result.unmeasured.reason if result.unmeasured else "no file was made")
    if lined is None:
        raise CompressError("the float weights behind this file are not known")
    if artifact.format != "onnx":
        raise CompressError(f"the rounding of {artifact.format} files is not read")
    source = unrounded(lined, setting, bench) or artifact.path
    fit, seed = bench.splits.fit, bench.seed
    determined_by = (digests.of_file(source), artifact.sha256, fit.sha256, seed)
    known = bench.ledger.find(Rounding, *determined_by)
    if known is None:
        known = reading(lined.lane, setting.name, source, artifact.path, fit, seed=seed)
        bench.ledger.enter(known, *determined_by)
    return replace(known, lane=lined.lane, setting=setting.name)
