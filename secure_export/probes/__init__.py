"""Probes: search for a trigger that nobody has named, one family of perturbations each.

A probe sees a differentiable twin (or only the file's logits) and the fit split; never the holdout, never a
known trigger, and nothing that the purifier searched for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation
from secure_export.records.searches import Aim, aims, probe_name
from secure_export.registry import Plugin

if TYPE_CHECKING:
    from torch import Generator, Tensor

Logits = Callable[["Tensor"], "Tensor"]
Free = list["Tensor"]
"""The free variables of R perturbations, each [R, ...]; a search moves them, a warm one goes on from them."""


class Probe(Plugin):
    """A family of perturbations with a budget, and how long to search it."""

    steps: int = Field(40, ge=1, description="optimization steps")
    images: int = Field(6, ge=1, description="fit samples in each step, the same for every class and start")
    starts: int = Field(1, ge=1, description="random starts for each class; the best on fit counts")
    finalists: float = Field(
        1.0, gt=0, le=1, description="share of classes and starts that go on after a third of the steps"
    )
    lr: float = Field(0.5, gt=0, description="learning rate of Adam on the free variables")
    queries: int = Field(150, ge=1, description="proposals per class where the file gives no gradient")
    contrast: bool = Field(
        False,
        description="search what works in the file and not in a reference made of it on the spot, which "
        "forgot what clean samples never ask for: for the metrics in _contrast",
    )
    by_source: bool = Field(
        False,
        description="search every pair of classes: a trigger that carries samples of one class alone into "
        "another, counted on that class; with K classes K - 1 times as many",
    )
    surrogate: bool = Field(
        False,
        description="follow a slope that is lent to the network where it has none, for triggers behind hard "
        "steps, below which nothing moves",
    )

    @property
    def name(self) -> str:
        """What rules and reports call it: a policy may search a family in several ways."""
        return probe_name(self.kind, self.contrast, self.by_source, self.surrogate)

    def aims(self, classes: int) -> tuple[Aim, ...]:
        """What a search without a known trigger looks for: each class, or each pair of classes."""
        return aims(classes, by_source=self.by_source)

    @abstractmethod
    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Free variables of `count` perturbations of inputs of `shape` (without the batch axis)."""

    def candidates(self, shape: torch.Size) -> Free | None:
        """A list worth trying before the search, which begins with the best for each class; None has none."""
        return None

    @abstractmethod
    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """The perturbations that `free` stands for: differentiable, and always within the budget."""

    def proposed(self, free: Sequence[Tensor], share: float, generator: Generator) -> Free:
        """`free` with a run of about `share` of each row drawn anew, for searches without a gradient."""
        changed = [variable.clone() for variable in free]
        for variable in changed:
            for row in variable.flatten(1):
                length = max(1, int(share * len(row)))
                first = int(torch.randint(0, len(row) - length + 1, (), generator=generator))
                row[first : first + length] += 2 * torch.randn(length, generator=generator)
        return changed

    @abstractmethod
    def budget(self, shape: torch.Size) -> str:
        """How large a perturbation may be, in words and in the units of these inputs."""
