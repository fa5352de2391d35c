"""Locate and purify: which class would a backdoor aim at, and the model without it.

Nothing here sees a known trigger or the holdout: locators and purifiers are handed the fit split, and a
ladder of purifiers is tried on the calibration split.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save

from secure_export import digests, registry, views, whole
from secure_export.errors import CompressError
from secure_export.ladder import Rehearsal
from secure_export.lane import Bench
from secure_export.locators import Locator
from secure_export.purifiers import Purifier, class_after_class
from secure_export.records.measured import (
    ALWAYS_NAMES,
    LOOKED_AT_AGAIN,
    UNREAD,
    Artifact,
    Disagreement,
    SettingResult,
    Suspect,
)
from secure_export.records.memory import Subject, View
from secure_export.records.reported import Purification, Rung
from secure_export.runtimes import Runtime
from secure_export.runtimes import runtime as runtime_of

if TYPE_CHECKING:
    from torch import nn

    from secure_export.policy import Locate, Policy, Setting


def locate(
    wanted: Locate,
    subject: Subject | None,
    originals: Sequence[SettingResult],
    bench: Bench,
    settings: Sequence[Setting] = (),
) -> tuple[Suspect, ...]:
    """What every locator says of the full-precision subject and of each of its compressed files.

    `subject` None: only a file is there, as another tool made it. A compiled file is read through the setting
    of `settings` that has the same steps in another format.
    """
    suspects = []
    for spec in wanted.methods:
        locator = registry.build(Locator, "locators", spec)
        if locator.needs_module:
            if subject is None:
                suspects.append(_unread(locator, "subject", "a file of another tool has no module to train"))
                continue
            read = partial(views.of_module, subject.model, subject.head, "subject")
            suspects.append(_suspect(locator, subject.identity, read, "subject", bench))
            continue
        for done, result in enumerate(originals, start=1):
            artifact = result.artifact
            if artifact is None:
                reason = result.unmeasured.reason if result.unmeasured else "no file"
                suspects.append(_unread(locator, result.setting, reason))
            else:
                artifact = _readable(result.setting, artifact, originals, settings)
                runtime = runtime_of(artifact.runtime, bench.runtime)
                read = partial(runtime.view, artifact.path, result.setting)
                owner = subject.identity if subject else ""
                found = _suspect(locator, artifact.sha256, read, result.setting, bench, artifact.path, owner)
                suspects.append(found)
            bench.progress(f"locate: {locator.kind}", done, len(originals))
    return tuple(suspects)


def disagreements(suspects: Sequence[Suspect], settings: Sequence[Setting]) -> tuple[Disagreement, ...]:
    """Where locators that read the same weights differ; the subject counts with its uncompressed file.

    One that names a class for every model is heard only beside another class: next to "none" it says nothing.
    """
    plain = next((setting.name for setting in settings if not setting.steps), "subject")
    heard: dict[str, dict[str, Suspect]] = {}
    for suspect in suspects:
        if suspect.scores and suspect.judged:
            where = plain if suspect.setting == "subject" else suspect.setting
            heard.setdefault(where, {})[suspect.locator] = suspect
    found = []
    for setting, said in heard.items():
        free = {s.target_class for s in said.values() if not s.evidence.get(ALWAYS_NAMES)}
        if len(free) > 1 or len({s.target_class for s in said.values()} - {None}) > 1:
            found.append(Disagreement(setting, {kind: s.target_class for kind, s in said.items()}))
    return tuple(found)


def _readable(
    name: str, artifact: Artifact, originals: Sequence[SettingResult], settings: Sequence[Setting]
) -> Artifact:
    """The file whose head stands for that of `artifact`: itself, wherever its runtime can read it."""
    if reads_heads(artifact):
        return artifact
    steps = {setting.name: setting.steps for setting in settings}
    twins = [
        other.artifact
        for other in originals
        if other.artifact and reads_heads(other.artifact) and steps.get(other.setting) == steps.get(name)
    ]
    return twins[0] if name in steps and twins else artifact


def reads_heads(artifact: Artifact) -> bool:
    """Whether locators can read the file's head."""
    runtime = registry.load("runtimes", artifact.runtime)
    return issubclass(runtime, Runtime) and runtime.reads_heads


def _suspect(
    locator: Locator,
    weights: str,
    read: Callable[[], View],
    setting: str,
    bench: Bench,
    file: Path | None = None,
    owner: str = "",
) -> Suspect:
    """`owner` is the subject whose architecture a file of weights alone is loaded into."""
    fit, asked = bench.splits.fit, (locator.kind, locator.model_dump())
    determined_by = (weights, owner, dict(bench.runtime), *asked, fit.sha256, bench.seed)
    known = bench.ledger.find(Suspect, *determined_by)
    if known is not None:
        return replace(known, setting=setting)
    try:
        found = locator.locate(read(), fit, seed=bench.seed, progress=bench.progress)
    except CompressError as error:
        return _unread(locator, setting, error.message)
    if file is not None and digests.of_file(file) != weights:
        return _unread(locator, setting, "the file changed while it was read")
    return bench.ledger.enter(found, *determined_by)


def _unread(locator: Locator, setting: str, reason: str) -> Suspect:
    return Suspect(locator.kind, setting, None, (), {UNREAD: reason})


@dataclass(frozen=True)
class Treated:
    """What the ledger keeps of a purified model; its weights lie in the work folder and count by digest."""

    sha256: str
    purification: Purification


@dataclass(frozen=True)
class Candidate:
    """A purified model, the digest of its weights, and how it came about."""

    model: nn.Module
    identity: str
    purification: Purification


@dataclass(frozen=True)
class Defended:
    """What the purified lane starts from; `suspects` are classes that are still named and were left."""

    model: nn.Module
    identity: str
    purification: Purification | None
    suspects: tuple[Suspect, ...] = ()


def purify(policy: Policy, subject: Subject, suspects: Sequence[Suspect], bench: Bench) -> Defended:
    """Purify every class that the policy wants purified, then look again, as often as the policy says.

    The subject itself where no class is named. A class that is still named when the rounds are used up comes
    back as a suspect, which no policy lets pass.
    """
    done = Defended(subject.model, subject.identity, None)
    targets = suspected_classes(suspects, policy.locate)
    left: tuple[Suspect, ...] = ()
    for _ in range(policy.locate.rounds):
        if not policy.rungs or not targets:
            break
        done = joined(done, best(policy, subject, done, targets, bench))
        if policy.locate.rounds == 1:
            break
        left = relocate(policy, subject, done, bench)
        targets = suspected_classes(left, policy.locate)
    return replace(done, suspects=left)


def joined(before: Defended, after: Candidate) -> Defended:
    """The later model, with the whole history."""
    first, last = before.purification, after.purification
    if first is not None:
        last = replace(
            last,
            target_classes=tuple(sorted({*first.target_classes, *last.target_classes})),
            history=(*first.history, *last.history),
            seconds=first.seconds + last.seconds,
            rungs=(*first.rungs, *last.rungs),
        )
    return Defended(after.model, after.identity, last)


def relocate(policy: Policy, subject: Subject, done: Defended, bench: Bench) -> tuple[Suspect, ...]:
    """What the locators say of the purified model and its files, of classes that were not purified.

    Of a purified class they say nothing: a purifier may have trained what they measure. Where unconfirmed
    classes are purified, later rounds hear decisive locators alone: one that always names a class would never
    let them end. One that could not judge a file comes back too, for that is no silence.
    """
    classes = done.purification.target_classes if done.purification else ()
    files = Rehearsal(policy, subject, classes, bench).files(done.model, done.identity, done.purification)
    now = replace(subject, model=done.model, sha256=done.identity)
    found = locate(policy.locate, now, files, bench, policy.expanded_settings())
    return tuple(
        replace(suspect, setting=f"{suspect.setting}{LOOKED_AT_AGAIN}")
        for suspect in found
        if (suspect.target_class is not None or not suspect.judged)
        and suspect.target_class not in classes
        and (policy.locate.unconfirmed != "purify" or suspect.locator in policy.locate.decisive)
    )


def best(
    policy: Policy, subject: Subject, start: Defended, targets: tuple[int, ...], bench: Bench
) -> Candidate:
    """The first rung that nothing speaks against on the calibration split, or else the least faulty."""
    if len(policy.rungs) == 1:
        return treated(policy.rungs[0], subject, start, targets, bench)
    rehearsal = Rehearsal(policy, subject, targets, bench)
    tried: list[tuple[Candidate, tuple[str, ...]]] = []
    for spec in policy.rungs:
        candidate = treated(spec, subject, start, targets, bench)
        broken = rehearsal.broken(candidate.model, candidate.identity, candidate.purification)
        tried.append((candidate, broken))
        if not broken:
            break
    kept, _ = min(tried, key=lambda pair: len(pair[1]))
    rungs = tuple(
        Rung(done.kind, done.parameters, done.target_classes, candidate is kept, broken, done.seconds)
        for candidate, broken in tried
        for done in (candidate.purification,)
    )
    return replace(kept, purification=replace(kept.purification, rungs=rungs))


def treated(
    spec: Mapping[str, Any], subject: Subject, start: Defended, targets: tuple[int, ...], bench: Bench
) -> Candidate:
    """One purifier on a copy of the model, class after class."""
    purifier = registry.build(Purifier, "purifiers", spec)
    model = copy.deepcopy(start.model)
    determined_by = (
        start.identity,
        subject.architecture,
        purifier.kind,
        purifier.model_dump(),
        targets,
        bench.splits.fit.sha256,
        bench.seed,
    )
    path = bench.folder / f"purified-{digests.of_json(determined_by)[:16]}.safetensors"
    known = bench.ledger.find(Treated, *determined_by)
    content = path.read_bytes() if known is not None and path.is_file() else b""
    if known is not None and digests.of_bytes(content) == known.sha256:
        model.load_state_dict(load(content))
        return Candidate(model.eval(), known.sha256, known.purification)
    started = time.perf_counter()
    purified = class_after_class(
        purifier, model, subject.head, targets, bench.splits.fit, bench.seed, bench.progress
    )
    model = purified.model
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    whole.write(path, content)
    purification = Purification(
        kind=purifier.kind,
        parameters=purifier.model_dump(),
        target_classes=targets,
        history=purified.history,
        seconds=time.perf_counter() - started,
    )
    done = bench.ledger.enter(Treated(digests.of_bytes(content), purification), *determined_by)
    return Candidate(model.eval(), done.sha256, done.purification)


def suspected_classes(suspects: Sequence[Suspect], wanted: Locate) -> tuple[int, ...]:
    """The classes to purify, ascending: named on any setting, by a locator that the policy heeds."""
    heard = [s for s in suspects if s.locator in wanted.decisive or wanted.unconfirmed == "purify"]
    return tuple(sorted({s.target_class for s in heard if s.target_class is not None}))
