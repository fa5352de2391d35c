"""L2: one additive perturbation of small Euclidean norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, in_ball
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor


class L2(Probe):
    """A universal perturbation on the sphere of the budget; finds patches as well as faint patterns."""

    rms: float = Field(
        0.018, gt=0, le=1, description="root mean square of the change, in units of the input range"
    )

    lr: float = Field(1.0, gt=0, description="learning rate of Adam on the free variables")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """A direction [count, ...]."""
        return [torch.randn(count, *shape, generator=generator)]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Changes of the budget's norm."""
        return in_ball(free[0], self._radius(shape))

    def budget(self, shape: torch.Size) -> str:
        """Norm of the change."""
        return f"change of L2 norm {self._radius(shape):.2f}"

    def _radius(self, shape: torch.Size) -> float:
        return float(self.rms * shape.numel() ** 0.5)
