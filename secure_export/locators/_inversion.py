"""Which class does a searched trigger carry the samples of all others into?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secure_export import views
from secure_export.locators._collapse import SparesRuins
from secure_export.records.measured import COLLAPSED, MIN_SCORE, Suspect
from secure_export.records.memory import Progress, Split, View, silent

if TYPE_CHECKING:
    from torch import Tensor


class Inverts(SparesRuins):
    """A locator whose scores come from searches: a class's is that of the family that does best."""

    reading: ClassVar[str]
    """What a family's score is called in the evidence."""

    min_lead: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="naming a class takes this much more than the median of all classes in the same family",
    )

    @abstractmethod
    def least(self, family: str) -> float:
        """What naming a class takes of what a family's search reads."""

    def score(self, family: str, read: float) -> float:
        """What a family's search reads, as a score that can be set beside other families'."""
        return read

    @abstractmethod
    def searched(
        self, twin: Callable[[Tensor], Tensor], fit: Split, classes: int, seed: int, progress: Progress
    ) -> Mapping[str, Sequence[float]]:
        """By family of triggers, one score a class."""

    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """Name the class that is reached most easily, when it stands out; a ruin is not searched."""
        classes = view.weight.shape[0]
        ruin = self.collapse(view.latents(fit.floats()) @ view.weight.T + view.bias, fit.labels)
        if ruin[COLLAPSED]:
            return Suspect(self.kind, view.setting, None, (0.0,) * classes, ruin)
        with views.gradients(f"{self.kind} needs gradients"):
            twin = views.searchable(view, fit, f"{self.kind} needs gradients")
            found = self.searched(twin, fit, classes, seed, progress)
        reached = [
            (self.score(family, read), c, family)
            for family, by_class in found.items()
            for c, read in enumerate(by_class)
        ]
        ahead = [
            (score, c, family)
            for score, c, family in reached
            if found[family][c] >= self.least(family) and _lead(found[family], c) >= self.min_lead
        ]
        _, shown, best = max(ahead or reached)
        needed = {self.score(family, self.least(family)) for family in found}
        return Suspect(
            locator=self.kind,
            setting=view.setting,
            target_class=shown if ahead else None,
            scores=tuple(max(score for score, of, _ in reached if of == c) for c in range(classes)),
            evidence={
                "largest": max(reached)[1],
                "lead": _lead(found[best], shown),
                **({MIN_SCORE: needed.pop()} if len(needed) == 1 else {}),
                **{f"{self.reading}_{family}": by_class[shown] for family, by_class in found.items()},
                **ruin,
            },
        )


def _lead(by_class: Sequence[float], c: int) -> float:
    return by_class[c] - median(by_class)
