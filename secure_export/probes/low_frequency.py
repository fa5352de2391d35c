"""Low frequency: a smooth pattern blended over the whole input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, enlarged, spatial, untouched
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor


class LowFrequency(Probe):
    """x' = (1 - alpha) x + alpha p with p smooth: blends, vignettes, colour casts, slow stripes."""

    alpha: float = Field(0.06, gt=0, le=1, description="share of the pattern in the mix")
    grid: int = Field(8, ge=2, description="control points a side; more let faster patterns in")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Logits of the pattern [count, channels, grid, ...]."""
        channels = shape[0] if len(shape) > 1 else 1
        return [torch.randn(count, channels, *[self.grid] * len(spatial(shape)), generator=generator)]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Mixes with patterns in [0, 1]."""
        pattern = torch.sigmoid(enlarged(free[0], spatial(shape))).view(-1, *shape)
        return Perturbation((1 - self.alpha) * untouched(len(pattern), shape), self.alpha * pattern)

    def budget(self, shape: torch.Size) -> str:
        """Share of the pattern and its resolution."""
        return f"blend of {100 * self.alpha:g} % with a pattern of {self.grid} control points a side"
