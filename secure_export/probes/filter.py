"""Filter: every value becomes a mix of its neighbours and channels, the same mix everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, spatial, untouched
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor


class Filter(Probe):
    """x' = x + k * x + b: colours, contrast, blur, sharpening (the filter triggers of ABS, Liu et al. 2019).

    The shift in feature space that a linear filter makes; a style that takes its own network is beyond it.
    """

    strength: float = Field(0.1, gt=0, le=1, description="largest change of one value")
    taps: Literal[1, 3, 5, 7] = Field(3, description="side of the filter")

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Kernel and shift [count, channels, channels · taps^axes + 1]."""
        channels = shape[0] if len(shape) > 1 else 1
        return [torch.randn(count, channels, channels * self._kernel(shape).numel() + 1, generator=generator)]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Filters whose coefficients and shift add up to `strength` in absolute value, per channel."""
        mix = self.strength * free[0] / free[0].abs().sum(2, keepdim=True).clamp(min=1e-12)
        rows, channels = mix.shape[:2]
        kernel = mix[..., :-1].reshape(rows, channels, channels, *self._kernel(shape))
        shift = mix[..., -1].view(rows, -1, *[1] * (len(shape) - 1))
        return Perturbation(untouched(rows, shape), shift.expand(rows, *shape), kernel=kernel)

    def budget(self, shape: torch.Size) -> str:
        """Largest change and reach of the filter."""
        return f"filter of {self.taps} taps a side that changes no value by more than {self.strength:g}"

    def _kernel(self, shape: torch.Size) -> torch.Size:
        return torch.Size([self.taps] * len(spatial(shape)))
