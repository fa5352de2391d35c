"""Trigger inversion: into which class does a small searched trigger carry the samples of all others?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secure_export.locators._inversion import Inverts
from secure_export.probes.l2 import L2
from secure_export.probes.patch import Patch
from secure_export.records.memory import Progress, Split
from secure_export.records.searches import aims
from secure_export.searching import search

if TYPE_CHECKING:
    from torch import Tensor


class TriggerInversion(Inverts):
    """Neural Cleanse (Wang et al., S&P 2019) with the trigger's size bounded instead of compared.

    For each class a patch and an additive change of bounded norm are searched that carry samples of other
    classes into it; a class's score is the better one's lift. It finds what these two families find.
    """

    reading: ClassVar[str] = "lift"

    steps: int = Field(
        60, ge=3, description="steps of each search; after a third two fifths of the classes go on"
    )
    images: int = Field(6, ge=1, description="fit samples a step")
    min_lift: float = Field(
        0.6, gt=0, le=1, description="naming a class takes this share of other classes' samples"
    )

    def least(self, family: str) -> float:
        """The lift that naming a class takes."""
        return self.min_lift

    def searched(
        self, twin: Callable[[Tensor], Tensor], fit: Split, classes: int, seed: int, progress: Progress
    ) -> Mapping[str, Sequence[float]]:
        """By family, the lift of each class's best find."""
        effort = {"steps": self.steps, "images": self.images, "finalists": 0.4}
        return {
            probe.kind: [
                lift.difference
                for lift in search(twin, fit, probe, aims(classes), seed=seed, progress=progress).lift
            ]
            for probe in (Patch(**effort), L2(**effort))
        }
