"""ACC, ASR, lift and RA as counts, from any function from inputs to logits (definitions: DESIGN §5)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secure_export.errors import CompressError
from secure_export.perturbations import as_samples
from secure_export.records.measured import Count, Lane, Measurement, Paired, PairLift, TriggerCounts
from secure_export.records.memory import Predictor, Progress, Split, silent
from secure_export.triggers import Trigger

BATCH_SIZE = 256


@dataclass(frozen=True)
class Reference:
    """What a setting is compared with, over the same holdout samples."""

    subject_predictions: Tensor
    """Classes [N] by the untouched full-precision subject: `acc_drop` is paired with these."""
    logits: Tensor
    """Logits [N, classes] of the full-precision model of the same lane: for agreement."""


def logits_of(predictor: Predictor, split: Split, trigger: Trigger | None = None) -> Tensor:
    """Logits [N, classes] on a split, triggered or clean.

    Raises:
        CompressError: a logit is not finite; such a file cannot be measured, let alone pass.
    """
    batches = []
    for start in range(0, len(split), BATCH_SIZE):
        inputs = split.floats(slice(start, start + BATCH_SIZE))
        batches.append(predictor(inputs if trigger is None else as_samples(trigger(inputs), split)))
    logits = torch.cat(batches)
    if not bool(torch.isfinite(logits).all()):
        raise CompressError("the file gives logits that are not finite")
    return logits


def measure(
    predictor: Predictor,
    holdout: Split,
    triggers: Mapping[str, Trigger],
    reference: Reference,
    *,
    lane: Lane,
    setting: str,
    progress: Progress = silent,
) -> Measurement:
    """Everything that the rules read, for one artifact."""
    started = time.perf_counter()
    logits = logits_of(predictor, holdout)
    seconds = time.perf_counter() - started
    classes = logits.shape[1]
    if logits.shape != reference.logits.shape:
        raise CompressError(
            f"{setting}: got logits {tuple(logits.shape)}, expected {tuple(reference.logits.shape)}"
        )
    clean = logits.argmax(1)
    counted = []
    for done, (name, trigger) in enumerate(triggers.items(), start=1):
        triggered = logits_of(predictor, holdout, trigger).argmax(1)
        counts = count_trigger(name, clean, triggered, holdout.labels, classes)
        counted.append(replace(counts, changed=count_changed(trigger, holdout)))
        progress(f"measure {lane} {setting}", done, len(triggers))
    total = len(holdout)
    right = clean == holdout.labels
    base_right = reference.subject_predictions == holdout.labels
    return Measurement(
        lane=lane,
        setting=setting,
        acc=Count(_hits(right), total),
        acc_drop=Paired(_hits(base_right & ~right), _hits(~base_right & right), total),
        agreement=Count(_hits(clean == reference.logits.argmax(1)), total),
        logit_difference=float((logits - reference.logits).abs().max()),
        top_share=Count(int(clean.bincount(minlength=classes).max()), total),
        triggers=tuple(counted),
        latency_ms=1000 * seconds / total,
        batch_size=BATCH_SIZE,
        of_class=tuple(holdout.labels.bincount(minlength=classes).tolist()),
    )


def count_trigger(name: str, clean: Tensor, triggered: Tensor, labels: Tensor, classes: int) -> TriggerCounts:
    """Counts per candidate target class c, over the samples whose true class is not c.

    `clean`, `triggered` and `labels` are classes [N].
    """
    asr, lift, ra = [], [], []
    for c in range(classes):
        others = labels != c
        total = _hits(others)
        hit, before = others & (triggered == c), others & (clean == c)
        asr.append(Count(_hits(hit), total))
        lift.append(Paired(_hits(hit & ~before), _hits(before & ~hit), total))
        ra.append(Count(_hits(others & (triggered == labels)), total))
    pairs = tuple(_pairs(clean, triggered, labels))
    return TriggerCounts(name, tuple(asr), tuple(lift), tuple(ra), pairs=pairs)


def _pairs(clean: Tensor, triggered: Tensor, labels: Tensor) -> Iterator[PairLift]:
    """Where samples of a class are carried into another, ascending: the lift on that class alone."""
    carried = (triggered != labels) & (triggered != clean)
    ways = zip(labels[carried].tolist(), triggered[carried].tolist(), strict=True)
    for source, into in sorted(set(ways)):
        own = labels == source
        hit, before = own & (triggered == into), own & (clean == into)
        lift = Paired(_hits(hit & ~before), _hits(before & ~hit), _hits(own))
        yield PairLift(source, into, lift)


def count_changed(trigger: Trigger, split: Split) -> Count:
    """How many of the first samples it alters: a white patch on a white margin does nothing."""
    inputs = split.floats(slice(0, BATCH_SIZE))
    return Count(_hits((as_samples(trigger(inputs), split) != inputs).flatten(1).any(1)), len(inputs))


def _hits(mask: Tensor) -> int:
    return int(mask.sum())
