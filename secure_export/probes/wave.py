"""Wave: a few plane waves added to the whole input: stripes, gratings, slow shades."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.perturbations import Perturbation, slow_waves, slowest_waves, spatial, untouched, waves
from secure_export.probes import Free, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

ALONE = 9.0
"""How much more of the amplitude a wave has than all others together, when it is tried alone."""
QUARTERS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))
"""Where a wave begins."""


class Wave(Probe):
    """x' = x + sum of plane waves whose amplitudes add up to a bound, so that few of them are left.

    To the spectrum what `patch` is to positions. SIG (Barni et al. 2019) is one wave, a smooth pattern a few.
    """

    amplitude: float = Field(0.1, gt=0, le=1, description="sum of the amplitudes: no value changes by more")
    fastest: float = Field(0.25, gt=0, le=0.5, description="periods a position of the fastest wave")

    scan: int = Field(
        0,
        ge=0,
        description="try so many of the slowest waves alone, in four phases each; the best of them are the "
        "starts of a class, all but one",
    )

    def begin(self, shape: torch.Size, count: int, generator: Generator) -> Free:
        """Logits of each wave's share [count, waves], and how it stands in a channel [count, C, waves, 2].

        All waves begin with about the same share, weak and alike in every channel: those that help stand out
        within a few steps, and no channel has to turn round to meet the others.
        """
        channels = shape[0] if len(shape) > 1 else 1
        number = len(slow_waves(spatial(shape), self.fastest))
        share = 0.3 * torch.randn(count, number, generator=generator)
        turn = 0.3 * torch.randn(count, 1, number, 2, generator=generator)
        return [share, turn.repeat(1, channels, 1, 1)]

    def candidates(self, shape: torch.Size) -> Free | None:
        """Single waves in every quarter of a turn, alike in all channels, with a little of the others."""
        if not self.scan:
            return None
        channels = shape[0] if len(shape) > 1 else 1
        number = len(slow_waves(spatial(shape), self.fastest))
        tried = slowest_waves(spatial(shape), self.fastest, self.scan)
        share = (math.log(ALONE * number) * torch.eye(number)[tried]).repeat_interleave(len(QUARTERS), 0)
        turn = torch.tensor(QUARTERS).repeat(len(tried), 1)[:, None, None].repeat(1, channels, number, 1)
        return [share, turn]

    def perturbation(self, free: Sequence[Tensor], shape: torch.Size) -> Perturbation:
        """Additive, within the amplitude."""
        added = self.amplitude * waves(free[0], free[1], spatial(shape), self.fastest)
        return Perturbation(untouched(len(added), shape), added.view(-1, *shape))

    def budget(self, shape: torch.Size) -> str:
        """Amplitude and the number of waves to choose from."""
        number = len(slow_waves(spatial(shape), self.fastest))
        return f"{number} waves whose amplitudes add up to {self.amplitude:g}"
