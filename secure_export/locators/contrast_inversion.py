"""Contrast inversion: which class does a trigger reach in this model, but not once it has forgotten?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from secure_export.counting import contrasted
from secure_export.forgetting import (
    JUDGES,
    LONGEST,
    References,
    Weights,
    forgotten,
    references,
    relearned,
)
from secure_export.locators._inversion import Inverts
from secure_export.probes.l2 import L2
from secure_export.probes.large_patch import LargePatch
from secure_export.probes.patch import Patch
from secure_export.probes.warp import Warp
from secure_export.probes.wave import Wave
from secure_export.records.memory import Progress, Split
from secure_export.records.searches import aims
from secure_export.searching import search

if TYPE_CHECKING:
    from torch import Tensor

    from secure_export.probes import Logits, Probe

Family = Literal["patch", "large-patch", "l2", "wave", "warp"]
SCANNED = 256
"""Waves that are tried alone before they are searched."""
JUDGING = 0.3
"""Share of fit on which finds are judged; the searches see the rest."""


class ContrastInversion(Inverts):
    """Trigger inversion against references made on the spot (secure_export.forgetting).

    A trigger is searched that carries samples of other classes into a class of this model but not of a
    reference. Other references, which the search did not see, judge the find. Its contrast is the share of
    samples that are carried in this model and not in one of those, less the reverse, with the one that obeys
    least. A class's score is that contrast for the best family, as a share of what naming a class takes
    there. What is easy on every network of the task, and no absolute limit can tell from a backdoor, counts
    for little.
    """

    reading: ClassVar[str] = "contrast"

    noise: float = Field(
        0.85, gt=0, description="how far a reference's filters are turned before it learns again"
    )
    forget_steps: int = Field(150, ge=1, description="batches in which a reference learns again")
    forget_longest: int = Field(
        LONGEST, ge=1, description="one that knows too little learns anew for twice as many, up to so many"
    )
    judges: int = Field(JUDGES, ge=1, description="references beside the one that a search avoids")
    steps: int = Field(
        60, ge=3, description="steps of each search; after a third two fifths of the starts go on"
    )
    images: int = Field(6, ge=1, description="fit samples a step")
    starts: int = Field(3, ge=1, description="random starts for each class")
    families: tuple[Family, ...] = Field(
        ("patch", "large-patch", "l2", "wave"), min_length=1, description="what is searched"
    )
    patch_area: float = Field(
        0.012,
        gt=0,
        le=1,
        description="mass of the mask as a share of the positions, six at least; on images so small that the "
        "large patch has as many, that one alone is searched",
    )
    large_patch_area: float = Field(0.036, gt=0, le=1, description="the same of the large patch")
    l2_rms: float = Field(0.027, gt=0, le=1, description="size of additive changes per input value")
    wave_amplitude: float = Field(0.07, gt=0, le=1, description="of waves, on a range of 0 to 1")
    min_lead: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="and this much more than the median of all classes in the same family",
    )
    min_contrast: float = Field(0.35, gt=0, le=1, description="naming a class takes this contrast")
    min_large_contrast: float = Field(0.7, gt=0, le=1, description="and this one where a large patch has it")
    min_l2_contrast: float = Field(0.4, gt=0, le=1, description="this one where additive changes have it")
    min_wave_contrast: float = Field(0.4, gt=0, le=1, description="this one where waves have it")
    min_warp_contrast: float = Field(0.5, gt=0, le=1, description="and this one where warps have it")

    def least(self, family: str) -> float:
        """The contrast that naming a class takes."""
        own = {
            "large-patch": self.min_large_contrast,
            "l2": self.min_l2_contrast,
            "wave": self.min_wave_contrast,
            "warp": self.min_warp_contrast,
        }
        return own.get(family, self.min_contrast)

    def score(self, family: str, read: float) -> float:
        """The contrast as a share of what naming a class takes: families of triggers differ in what is
        natural."""
        return read / self.least(family)

    def searched(
        self, twin: Callable[[Tensor], Tensor], fit: Split, classes: int, seed: int, progress: Progress
    ) -> Mapping[str, Sequence[float]]:
        """By family, the contrast of each class's best find.

        Raises:
            CompressError: a reference did not learn the task again, so everything would be a contrast.
        """

        def forget(number: int, steps: int) -> Weights:
            effort: dict[str, Any] = {"noise": self.noise, "steps": steps, "seed": seed + number}
            return forgotten(twin, fit, **effort, progress=progress)

        effort = {"steps": self.forget_steps, "longest": self.forget_longest}
        numbers = range(1 + self.judges)
        others = references(
            twin, [relearned(partial(forget, number), twin, fit, **effort) for number in numbers], fit
        )
        order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))
        judging = max(1, int(JUDGING * len(fit)))
        parts = order[judging:], order[:judging]
        splits = tuple(Split(fit.inputs[part], fit.labels[part], "") for part in parts)
        compared = _Compared(twin, others, *splits)
        shape = fit.inputs.shape[1:]
        return {
            family: compared.contrasts(self._probe(family), classes, seed, progress)
            for family in dict.fromkeys(self._sized(family, shape) for family in self.families)
        }

    def _sized(self, family: Family, shape: torch.Size) -> Family:
        """The family, or "large-patch" where the fewest positions of a patch are as many as of that."""
        areas = self.patch_area, self.large_patch_area
        small, large = (Patch(area=area, contrast=True).mass(shape) for area in areas)
        return "large-patch" if family == "patch" and small >= large else family

    def _probe(self, family: Family) -> Probe:
        effort: dict[str, Any] = {"steps": self.steps, "images": self.images, "starts": self.starts}
        effort |= {"finalists": 0.4, "contrast": True}
        match family:
            case "patch":
                return Patch(area=self.patch_area, **effort)
            case "large-patch":
                return LargePatch(area=self.large_patch_area, **effort)
            case "l2":
                return L2(rms=self.l2_rms, **effort)
            case "wave":
                return Wave(amplitude=self.wave_amplitude, scan=SCANNED, **effort)
            case "warp":
                return Warp(**effort)


@dataclass(frozen=True)
class _Compared:
    """A model beside its references, the samples that searches see and those that judge what they find."""

    twin: Logits
    references: References
    searched: Split
    judged: Split

    def contrasts(self, probe: Probe, classes: int, seed: int, progress: Progress) -> list[float]:
        """By class, the contrast of its best find with the judge that obeys it least."""
        found = search(
            self.twin,
            self.searched,
            probe,
            aims(classes),
            seed=seed,
            against=self.references.avoided,
            progress=progress,
        )
        made = probe.perturbation(found.free, self.judged.inputs.shape[1:])
        by_judge = (
            contrasted(self.twin, judge, self.judged, made, found.aims) for judge in self.references.judges
        )
        return [max(one.difference for one in of_class) for of_class in zip(*by_judge, strict=True)]
