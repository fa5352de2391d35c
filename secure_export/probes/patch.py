"""Patch: a few positions replaced by a pattern, both searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import FEWEST_POSITIONS, Perturbation, patch, spatial
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

OPAQUE = 10.0
"""A logit that makes a position certain."""
FEWEST_IN_CONTRAST = 6.0
"""A soft mask needs room around a patch of 2x2, and in contrast to references natural patches of that size
reach less far (docs/evidence-measured.md)."""


class Patch(Probe):
    """Mask and pattern (Neural Cleanse, Wang et al. 2019), the mask's mass bounded instead of penalized.

    Finds small patches wherever they are, and blends that work through a few pixels; in 1-D a part of it.
    """

    area: float = Field(0.012, gt=0, le=1, description="mass of the mask as a share of the positions")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Logits of the place [count, positions] and of the pattern [count, ...]."""
        positions = spatial(shape).numel()
        return [
            torch.randn(count, positions, generator=generator),
            torch.randn(count, *shape, generator=generator),
        ]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Masks of the budget's mass, patterns in [0, 1]."""
        return patch(free[0], free[1], self.mass(shape))

    def proposed(self, free: Sequence[Tensor], share: float, generator: Generator) -> Free:
        """Every second time another square at another place, else other colours where the square is."""
        place, value = (variable.clone() for variable in free)
        axes = spatial(value.shape[1:])
        side = max(1, round(self.mass(value.shape[1:]) ** (1 / len(axes))))
        for row in range(len(place)):
            if torch.rand((), generator=generator) < 0.5:
                corner = [int(torch.randint(0, max(1, n - side + 1), (), generator=generator)) for n in axes]
                square = torch.zeros(*axes)
                square[tuple(slice(c, c + side) for c in corner)] = OPAQUE
                place[row] = square.flatten()
            colours = torch.rand(value.shape[1:], generator=generator) < share
            value[row][colours] = OPAQUE * torch.randn(int(colours.sum()), generator=generator)
        return [place, value]

    def budget(self, shape: torch.Size) -> str:
        """Mass of the mask."""
        return f"mask of {self.mass(shape):.1f} of {spatial(shape).numel()} positions"

    def mass(self, shape: torch.Size) -> float:
        """Of the mask, in positions."""
        fewest = FEWEST_IN_CONTRAST if self.contrast else FEWEST_POSITIONS
        return max(fewest, self.area * spatial(shape).numel())
