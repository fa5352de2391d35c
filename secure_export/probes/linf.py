"""L-infinity: one additive perturbation that changes every value a little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, in_box
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor


class Linf(Probe):
    """A universal perturbation within a box; finds blends and stripes, misses patches."""

    epsilon: float = Field(8 / 255, gt=0, le=1, description="largest change of one value")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """A value [count, ...] before tanh."""
        return [0.5 * torch.randn(count, *shape, generator=generator)]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Changes within +-epsilon."""
        return in_box(free[0], self.epsilon)

    def budget(self, shape: torch.Size) -> str:
        """Largest change."""
        return f"change of at most {255 * self.epsilon:.1f}/255 in each value"
