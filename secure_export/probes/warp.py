"""Warp: every pixel taken from a little beside it, along a smooth field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, enlarged, spatial, untouched
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor


class Warp(Probe):
    """A smooth field of displacements, the family of WaNet (Nguyen and Tran 2021); in 1-D a warp of time."""

    reach: float = Field(0.047, gt=0, le=0.5, description="largest displacement as a share of the side")
    grid: int = Field(4, ge=2, description="control points a side")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Displacements [count, axes, grid, ...] before tanh."""
        axes = len(spatial(shape))
        return [0.5 * torch.randn(count, axes, *[self.grid] * axes, generator=generator)]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Displacements within +-reach of the side along each axis."""
        # grid_sample measures the side as 2.
        field = 2 * self.reach * torch.tanh(enlarged(free[0], spatial(shape)))
        if len(spatial(shape)) == 1:
            flow = torch.stack([field[:, 0], torch.zeros_like(field[:, 0])], dim=-1)[:, None]
        else:
            flow = field.permute(0, 2, 3, 1)
        still = untouched(len(field), shape)
        return Perturbation(still, torch.zeros(len(field), *shape), flow)

    def budget(self, shape: torch.Size) -> str:
        """Largest displacement."""
        side = max(spatial(shape))
        return f"displacement of at most {self.reach * side:.2f} pixels, {self.grid} control points a side"
