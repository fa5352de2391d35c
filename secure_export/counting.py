"""What perturbations do, as counts of samples: how many they carry, and how many that another model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from secure_export.perturbations import as_samples
from secure_export.records.measured import Count, Paired
from secure_export.records.memory import Split
from secure_export.records.searches import Aim

if TYPE_CHECKING:
    from torch import Tensor

    from secure_export.perturbations import Perturbation
    from secure_export.probes import Logits

MOST_ROWS = 512
"""Perturbed samples in one batch."""
JUDGED = 100
"""Fit samples that say how well a trigger does before anything touches the holdout."""


def judged_on(fit: Split, generator: torch.Generator, aims: Sequence[Aim] = ()) -> Split:
    """A few fit samples, drawn: the first ones may all be of one class. All, where an aim has a source."""
    if any(aim.source is not None for aim in aims):
        return fit
    index = torch.randperm(len(fit), generator=generator)[:JUDGED]
    return Split(fit.inputs[index], fit.labels[index], "")


def forwards_of(split: Split, aims: Sequence[Aim]) -> int:
    """How many samples counted() sends through the network."""
    return len(split) + sum(int(aim.among(split.labels).sum()) for aim in aims)


@torch.no_grad()
def counted(
    logits: Logits, split: Split, found: Perturbation, aims: Sequence[Aim]
) -> list[tuple[Count, Paired]]:
    """Per perturbation its ASR and its lift over the samples that it is meant for: of all other classes
    (DESIGN §5), or of its source alone."""
    return [
        (Count(int(hit.sum()), len(hit)), _paired(hit, before))
        for hit, before in _reached(logits, split, found, aims)
    ]


@torch.no_grad()
def contrasted(
    logits: Logits, reference: Logits, split: Split, found: Perturbation, aims: Sequence[Aim]
) -> list[Paired]:
    """Per perturbation: samples that it is meant for and carries in a model and not in a reference, against
    the reverse. Carried is what is of the class with it and not without."""
    both = (_reached(one, split, found, aims) for one in (logits, reference))
    return [_paired(*(hit & ~before for hit, before in each)) for each in zip(*both, strict=True)]


def _reached(
    logits: Logits, split: Split, found: Perturbation, aims: Sequence[Aim]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per perturbation, of the samples that it is meant for: which are of its class with it, and without."""
    inputs = split.floats()
    clean = torch.cat([logits(part).argmax(1) for part in torch.split(inputs, MOST_ROWS)])
    for number, aim in enumerate(aims):
        meant = aim.among(split.labels)
        if not bool(meant.any()):
            yield meant[meant], meant[meant]
            continue
        parts = torch.split(inputs[meant], MOST_ROWS)
        stamped = (found.stamp(part, torch.full((len(part),), number)) for part in parts)
        said = torch.cat([logits(as_samples(one, split)).argmax(1) for one in stamped])
        yield said == aim.into, clean[meant] == aim.into


def _paired(here: Tensor, there: Tensor) -> Paired:
    return Paired(int((here & ~there).sum()), int((there & ~here).sum()), len(here))
