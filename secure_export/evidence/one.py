"""One probe on one file: searched, scored, and kept so that it can be tried on another file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from secure_export import digests
from secure_export.counting import contrasted, counted, forwards_of, judged_on
from secure_export.errors import IntegrityError, NoVerdict
from secure_export.evidence.contrast import references_of
from secure_export.evidence.files import Opened
from secure_export.evidence.pictures import picture
from secure_export.forgetting import References
from secure_export.perturbations import Perturbation
from secure_export.probes import Free, Probe
from secure_export.records.measured import Paired, SettingResult
from secure_export.records.memory import Split
from secure_export.records.searches import Aim, FoundTrigger, Search, SearchMode
from secure_export.searching import Finds, check_sources, queried, search
from secure_export.surrogates import with_surrogates

if TYPE_CHECKING:
    from secure_export.lane import Bench
    from secure_export.policy import EvidenceSpec


@dataclass(frozen=True)
class Work:
    """What is the same for every search."""

    spec: EvidenceSpec
    probes: Mapping[str, Probe]
    classes: int
    bench: Bench
    scored_on: Split


@dataclass(frozen=True)
class Known:
    """A trigger that was found on an original file."""

    origin: str
    aim: Aim
    free: Free
    on_fit: float
    """Its lift on fit, or its contrast where the probe makes one."""


def best_known(
    searches: Sequence[Search], probe: Probe, work: Work, evident: Collection[tuple[str, Aim]] = ()
) -> tuple[Known, ...]:
    """The triggers of one probe that did best on fit, over every original file; each aim once a file.

    Those of `evident` (setting, aim) come first, and all of them: of each aim the best, then of each the
    second. Others only where `replayed` asks for more.
    """
    known = []
    for found in searches:
        if found.lane == "original" and found.probe == probe.name and not found.unsearched:
            free = _kept(found.triggers_sha256, work)
            if free is None:
                raise IntegrityError(f"triggers that {found.probe} found are damaged: run again")
            for row, trigger in enumerate(found.found):
                own = [variable[row] for variable in free]
                known.append(Known(found.setting, trigger.aim, own, trigger.on_fit))
    known.sort(key=lambda trigger: trigger.on_fit, reverse=True)
    turns = Counter[Aim]()
    first: list[tuple[int, Known]] = []
    for one in [one for one in known if (one.origin, one.aim) in evident]:
        first.append((turns[one.aim], one))
        turns[one.aim] += 1
    ahead = [one for _, one in sorted(first, key=lambda pair: pair[0])]
    known = ahead + [one for one in known if (one.origin, one.aim) not in evident]
    return tuple(known[: max(work.spec.replayed, len(ahead))])


def searched(
    result: SettingResult,
    file: Opened | str,
    probe: Probe,
    mode: SearchMode,
    known: Sequence[Known],
    work: Work,
) -> Search:
    """One probe on one file, from the ledger or anew."""
    if mode == "warm":
        probe = probe.model_copy(update={"steps": max(1, probe.steps // 2)})
    file_or_why = _usable(file, mode, known)
    if isinstance(file_or_why, str):
        return _unsearched(result, probe, mode, file_or_why, work)
    file = file_or_why
    determined_by = (
        file.sha256,
        file.answers,
        dict(file.environment),
        file.mixing,
        probe.kind,
        probe.model_dump(),
        mode,
        [(one.origin, *one.aim, *[digests.of_arrays(v.numpy()) for v in one.free]) for one in known],
        work.bench.splits.fit.sha256,
        work.scored_on.sha256,
        work.spec.model_dump(
            include={"samples", "scored", "seconds"} | ({"forget"} if _compares(probe, mode, work) else set())
        ),
        work.bench.seed,
    )
    stored = work.bench.ledger.find(Search, *determined_by)
    if stored is not None and _kept(stored.triggers_sha256, work) is not None:
        return replace(stored, lane=result.lane, setting=result.setting)
    try:
        done = _anew(file, probe, mode, known, work)
    except NoVerdict as error:
        return _unsearched(result, probe, mode, error.message, work)
    if file.result.artifact is None or digests.of_file(file.result.artifact.path) != file.sha256:
        return _unsearched(result, probe, mode, "the file changed while it was searched", work)
    return replace(work.bench.ledger.enter(done, *determined_by), lane=result.lane, setting=result.setting)


def _anew(file: Opened, probe: Probe, mode: SearchMode, known: Sequence[Known], work: Work) -> Search:
    started = time.perf_counter()
    if not known:
        check_sources(work.bench.splits.fit, probe.aims(work.classes))
    others = _references(file, probe, mode, work)
    raw = _run(file, probe, mode, known, others, work)
    done = Search(
        lane=file.result.lane,
        setting=file.result.setting,
        probe=probe.name,
        mode=mode,
        budget=probe.budget(_shape(work)),
        classes=tuple(dict.fromkeys(aim.into for aim in raw.aims)),
        gradient=mode != "replay" and file.twin is not None,
        agreement=file.agreement,
        steps=raw.steps,
        planned=0 if mode == "replay" else probe.queries if file.twin is None else probe.steps,
        forwards=raw.forwards,
        mixing=file.mixing,
        ended=raw.ended,
        pairs=len(raw.aims) if probe.by_source else None,
        seconds=0.0,
        triggers_sha256=_saved(raw.free, work),
        found=_scored(raw, probe, file, known, others, work),
    )
    return replace(done, seconds=round(time.perf_counter() - started, 3))


def _usable(file: Opened | str, mode: SearchMode, known: Sequence[Known]) -> Opened | str:
    """The file, or why this search cannot be made."""
    if isinstance(file, str):
        return file
    if file.collapsed:
        return file.collapsed
    if mode != "cold" and not known:
        return "no original file could be searched, so there is no trigger to begin with"
    return file


def _references(file: Opened, probe: Probe, mode: SearchMode, work: Work) -> References | None:
    """What this search works against, if it does; a replay can do without where none can be made."""
    if not _compares(probe, mode, work) or (mode == "replay" and file.twin is None):
        return None
    return references_of(file, work.spec.forget, work.bench)


def _compares(probe: Probe, mode: SearchMode, work: Work) -> bool:
    """Whether references are wanted: a replay counts on the file alone unless a rule reads more."""
    return probe.contrast and (mode != "replay" or work.spec.contrasted_again(probe.name))


def _run(
    file: Opened,
    probe: Probe,
    mode: SearchMode,
    known: Sequence[Known],
    others: References | None,
    work: Work,
) -> Finds:
    """What the mode asks for; the seed is this search's own and no purifier's."""
    fit, seed = work.bench.splits.fit, _seed(probe.name, mode, work)
    aims = tuple(one.aim for one in known) or probe.aims(work.classes)
    start = [torch.stack(list(rows)) for rows in zip(*(one.free for one in known), strict=True)] or None
    if mode == "replay" and start is not None:
        judged = judged_on(fit, torch.Generator().manual_seed(seed), aims)
        made = counted(file.predictor, judged, probe.perturbation(start, _shape(work)), aims)
        lift = tuple(lift for _, lift in made)
        return Finds(start, aims, lift, 0, forwards_of(judged, aims), len(aims))
    common: dict[str, Any] = {
        "seed": seed,
        "start": start,
        "seconds": work.spec.seconds,
        "progress": work.bench.progress,
    }
    if file.twin is None:
        return queried(file.predictor, fit, probe, aims, **common)
    avoided = others.avoided if others else None
    twin = with_surrogates(file.twin) if probe.surrogate else file.twin
    return search(twin, fit, probe, aims, against=avoided, judge=file.predictor, **common)


def _scored(
    raw: Finds,
    probe: Probe,
    file: Opened,
    known: Sequence[Known],
    others: References | None,
    work: Work,
) -> tuple[FoundTrigger, ...]:
    """Every trigger with its effect on fit; the best with counts on the holdout, by the file itself."""
    every = range(len(raw.aims))
    fit = judged_on(work.bench.splits.fit, torch.Generator().manual_seed(work.bench.seed), raw.aims)

    def contrasts(rows: Sequence[int], made: Perturbation, split: Split) -> list[tuple[Paired, ...]]:
        """Of every trigger, with each judge."""
        aims = [raw.aims[i] for i in rows]
        judges = others.judges if others else ()
        each = [contrasted(file.predictor, judge, split, made, aims) for judge in judges]
        return list(zip(*each, strict=True)) or [()] * len(rows)

    on_fit = contrasts(every, probe.perturbation(raw.free, _shape(work)), fit)
    # Chosen on fit, so that the count on the holdout is of one judge and its bound is exact.
    least_obedient = [max(range(len(one)), key=lambda j: one[j].difference, default=0) for one in on_fit]
    found = [
        FoundTrigger(
            raw.aims[i].into,
            raw.lift[i],
            fit_contrast=on_fit[i][least_obedient[i]] if on_fit[i] else None,
            origin=known[i].origin if known else "",
            source_class=raw.aims[i].source,
        )
        for i in every
    ]
    order = sorted(every, key=lambda i: found[i].on_fit, reverse=True)
    chosen = order if known else order[: work.spec.scored]
    made = probe.perturbation([variable[chosen] for variable in raw.free], _shape(work))
    counts = counted(file.predictor, work.scored_on, made, [raw.aims[i] for i in chosen])
    for i, (asr, lift), by_judge in zip(chosen, counts, contrasts(chosen, made, work.scored_on), strict=True):
        contrast = by_judge[least_obedient[i]] if by_judge else None
        found[i] = replace(found[i], asr=asr, lift=lift, contrast=contrast)
    found[order[0]] = replace(found[order[0]], picture=picture(made, 0, _shape(work)))
    return tuple(found)


def _unsearched(result: SettingResult, probe: Probe, mode: SearchMode, why: str, work: Work) -> Search:
    return Search(
        lane=result.lane,
        setting=result.setting,
        probe=probe.name,
        mode=mode,
        budget=probe.budget(_shape(work)),
        classes=(),
        gradient=False,
        agreement=None,
        steps=0,
        planned=0 if mode == "replay" else probe.steps,
        forwards=0,
        seconds=0.0,
        triggers_sha256="",
        found=(),
        unsearched=why,
    )


def _shape(work: Work) -> torch.Size:
    return work.scored_on.inputs.shape[1:]


def _seed(name: str, mode: SearchMode, work: Work) -> int:
    return int(digests.of_json(["probe", name, mode, work.bench.seed])[:12], 16)


def _path(work: Work, sha256: str) -> Path:
    return work.bench.folder / f"search-{sha256[:16]}.safetensors"


def _kept(sha256: str, work: Work) -> Free | None:
    """What _saved() wrote; None where it is not there, or damaged."""
    try:
        tensors = load_file(_path(work, sha256))
    except (OSError, SafetensorError):
        return None
    free = [tensors[name] for name in sorted(tensors, key=int)]
    return free if digests.of_arrays(*(variable.numpy() for variable in free)) == sha256 else None


def _saved(free: Free, work: Work) -> str:
    """Write the triggers beside the files they were found on; the digest that names them."""
    sha256 = digests.of_arrays(*(variable.numpy() for variable in free))
    tensors = {str(i): variable.contiguous() for i, variable in enumerate(free)}
    save_file(tensors, _path(work, sha256))
    return sha256
