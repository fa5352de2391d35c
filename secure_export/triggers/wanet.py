"""WaNet: a faint, fixed warp of the whole image (Nguyen and Tran 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.errors import DataError
from secure_export.triggers import Trigger

if TYPE_CHECKING:
    from torch import Tensor


class Wanet(Trigger):
    """One seeded warp for all images [N, C, H, W]; about s / 2 pixels of displacement on average."""

    k: int = Field(4, ge=2, description="control points a side")
    s: float = Field(0.5, gt=0, description="strength of the warp, in half pixels")
    grid_rescale: float = Field(1.0, gt=0, le=1, description="shrinks the grid towards the centre")
    seed: int = Field(0, ge=0, description="seed of the control points")

    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` in [0, 1].

        Raises:
            DataError: the inputs are no images of at least two pixels a side.
        """
        if inputs.ndim != 4 or min(inputs.shape[2:]) < 2:
            raise DataError(
                f"wanet: got inputs of shape {tuple(inputs.shape[1:])}, expected an image of at least "
                "2 pixels a side",
                hint="drop this trigger from the policy",
            )
        grid = self._grid(inputs.shape[2], inputs.shape[3]).to(inputs)
        warped = F.grid_sample(inputs, grid.expand(len(inputs), -1, -1, -1), align_corners=True)
        return warped.clamp_(0, 1)

    def _grid(self, height: int, width: int) -> Tensor:
        """Sampling grid [1, H, W, 2] in grid_sample's coordinates, the last axis as (column, row)."""
        generator = torch.Generator().manual_seed(self.seed)
        control = torch.rand(1, 2, self.k, self.k, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]
        size = torch.tensor([width, height], dtype=torch.float32)
        return ((identity + self.s * field.permute(0, 2, 3, 1) / size) * self.grid_rescale).clamp(-1, 1)
