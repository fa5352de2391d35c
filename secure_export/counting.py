"""What perturbations do, as counts of samples: how many they carry, and how many that another model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from secure_export.perturbations import as_samples
from secure_export.records.measured import Count, Paired
from secure_export.records.memory import Split

if TYPE_CHECKING:
    from torch import Tensor

    from secure_export.perturbations import Perturbation
    from secure_export.probes import Logits

MOST_ROWS = 512
"""Perturbed samples in one batch."""
JUDGED = 100
"""Fit samples that say how well a trigger does before anything touches the holdout."""


def judged_on(fit: Split, generator: torch.Generator) -> Split:
    """A few fit samples, drawn: the first ones may all be of one class."""
    index = torch.randperm(len(fit), generator=generator)[:JUDGED]
    return Split(fit.inputs[index], fit.labels[index], "")


@torch.no_grad()
def counted(
    logits: Logits, split: Split, found: Perturbation, targets: Sequence[int] | Tensor
) -> list[tuple[Count, Paired]]:
    """Per perturbation its ASR and its lift over the samples that are not of its class (DESIGN §5)."""
    return [
        (Count(int(hit.sum()), len(hit)), _paired(hit, before))
        for hit, before in _reached(logits, split, found, targets)
    ]


@torch.no_grad()
def contrasted(
    logits: Logits, reference: Logits, split: Split, found: Perturbation, targets: Sequence[int] | Tensor
) -> list[Paired]:
    """Per perturbation: samples of other classes that it carries in a model and not in a reference, against
    the reverse. Carried is what is of the class with it and not without."""
    both = (_reached(one, split, found, targets) for one in (logits, reference))
    return [_paired(*(hit & ~before for hit, before in each)) for each in zip(*both, strict=True)]


def _reached(
    logits: Logits, split: Split, found: Perturbation, targets: Sequence[int] | Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per perturbation, of the samples of other classes: which are called its class with it, and without."""
    inputs = split.floats()
    clean = torch.cat([logits(part).argmax(1) for part in torch.split(inputs, MOST_ROWS)])
    for number, target in enumerate(map(int, targets)):
        others = split.labels != target
        parts = torch.split(inputs[others], MOST_ROWS)
        stamped = (found.stamp(part, torch.full((len(part),), number)) for part in parts)
        said = torch.cat([logits(as_samples(one, split)).argmax(1) for one in stamped])
        yield said == target, clean[others] == target


def _paired(here: Tensor, there: Tensor) -> Paired:
    return Paired(int((here & ~there).sum()), int((there & ~here).sum()), len(here))
