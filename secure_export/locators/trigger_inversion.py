"""Trigger inversion: into which class does a small searched trigger carry the samples of all others?"""

from __future__ import annotations

from statistics import median

from pydantic import Field

from secure_export import views
from secure_export.errors import CompressError
from secure_export.locators._collapse import SparesRuins
from secure_export.probes.l2 import L2
from secure_export.probes.patch import Patch
from secure_export.records.measured import Suspect
from secure_export.records.memory import Progress, Split, View, silent
from secure_export.searching import search


class TriggerInversion(SparesRuins):
    """Neural Cleanse (Wang et al., S&P 2019) with the trigger's size bounded instead of compared.

    For each class a patch and an additive change of bounded norm are searched that carry samples of other
    classes into it; a class's score is the better one's lift. It finds what these two families find.
    """

    steps: int = Field(
        60, ge=3, description="steps of each search; after a third two fifths of the classes go on"
    )
    images: int = Field(6, ge=1, description="fit samples a step")
    min_lift: float = Field(
        0.6, gt=0, le=1, description="naming a class takes this share of other classes' samples"
    )
    min_lead: float = Field(0.3, ge=0, lt=1, description="and this much more than the median of all classes")

    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """Name the class that is reached most easily, when it is reached and the model is no ruin."""
        if view.twin is None:
            raise CompressError("trigger-inversion needs gradients, and this file has no differentiable twin")
        inputs = fit.floats()
        logits = view.latents(inputs) @ view.weight.T + view.bias
        ruin = self.collapse(logits, fit.labels)
        classes = range(view.weight.shape[0])
        effort = {"steps": self.steps, "images": self.images, "finalists": 0.4}
        with views.gradients("trigger-inversion needs gradients"):
            found = {
                probe.kind: search(view.twin, fit, probe, classes, seed=seed, progress=progress).lift
                for probe in (Patch(**effort), L2(**effort))
            }
        lifts = {kind: [paired.difference for paired in lift] for kind, lift in found.items()}
        scores = [max(of_class) for of_class in zip(*lifts.values(), strict=True)]
        named = max(classes, key=lambda c: scores[c])
        lead = scores[named] - median(scores)
        stands_out = scores[named] >= self.min_lift and lead >= self.min_lead
        return Suspect(
            locator=self.kind,
            setting=view.setting,
            target_class=named if stands_out and not ruin["collapsed"] else None,
            scores=tuple(scores),
            evidence={
                "largest": named,
                "lead": lead,
                **{f"lift_{kind}": lift[named] for kind, lift in lifts.items()},
                **ruin,
            },
        )
