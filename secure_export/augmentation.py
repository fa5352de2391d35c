"""Crops and mirror images: more samples of a few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

Augment = Literal["auto", "none", "crop-flip"]
CROP_SIDE = 24
"""Below this side a shifted crop cuts away what the label depends on."""


def augmented(inputs: Tensor, kind: Augment, flip: bool, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W] shifted by up to an eighth of the side (black border) and mirrored."""
    if kind == "none" or inputs.ndim != 4 or (kind == "auto" and min(inputs.shape[2:]) < CROP_SIDE):
        return inputs
    count, _, height, width = inputs.shape
    pad = max(1, min(height, width) // 8)
    padded = F.pad(inputs, (pad,) * 4)
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    index = torch.arange(count)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
