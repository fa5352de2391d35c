"""SIG: a sinusoid along the columns (Barni et al. 2019)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.errors import DataError
from secure_export.triggers import Trigger

if TYPE_CHECKING:
    from torch import Tensor


class Sig(Trigger):
    """x + delta sin(2 pi j f / m), j = 0..m-1 the last axis of images [N, C, H, W] or signals [N, C, T]."""

    delta: float = Field(40 / 255, gt=0, le=1, description="amplitude; the published 40 of 255")
    frequency: int = Field(6, ge=1, description="periods over the width (f)")

    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` in [0, 1], clipped.

        Raises:
            DataError: inputs without a spatial or time axis, or a width at which the sinusoid is zero.
        """
        if inputs.ndim < 3:
            raise DataError(
                f"sig: got inputs of shape {tuple(inputs.shape[1:])}, expected [N, C, T] or [N, C, H, W]",
                hint="drop this trigger from the policy",
            )
        width = inputs.shape[-1]
        # Sampled at whole half periods a sinusoid is zero everywhere: that trigger would change nothing.
        if 2 * self.frequency % width == 0:
            raise DataError(
                f"sig: {self.frequency} periods over a width of {width} are zero at every column",
                hint="choose a frequency whose double is no multiple of the width",
            )
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * columns * self.frequency / width)
        return (inputs + wave.to(inputs)).clamp_(0, 1)
