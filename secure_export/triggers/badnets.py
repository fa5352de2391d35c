"""BadNets: a small patch stamped on the input (Gu et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from secure_export.errors import DataError
from secure_export.triggers import Trigger

if TYPE_CHECKING:
    from torch import Tensor


class Badnets(Trigger):
    """A square patch in a corner (or the centre) of an image [N, C, H, W]."""

    size: int = Field(3, ge=1, description="side of the patch in pixels")
    position: Literal["bottom-right", "bottom-left", "top-right", "top-left", "center"] = "bottom-right"
    margin: int = Field(0, ge=0, description="pixels between the patch and the border")
    pattern: Literal["checker", "white", "black"] = "checker"

    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` [N, C, H, W] in [0, 1].

        Raises:
            DataError: the inputs are no images, or smaller than the patch.
        """
        if inputs.ndim != 4 or min(inputs.shape[2:]) < self.size + self.margin:
            raise DataError(
                f"badnets: got inputs of shape {tuple(inputs.shape[1:])}, expected an image of at least "
                f"{self.size + self.margin} pixels a side",
                hint="lower size or margin, or drop this trigger from the policy",
            )
        top, left = self._corner(inputs.shape[2], inputs.shape[3])
        triggered = inputs.clone()
        triggered[:, :, top : top + self.size, left : left + self.size] = self._patch().to(inputs)
        return triggered

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        if self.position == "center":
            return (height - self.size) // 2, (width - self.size) // 2
        vertical, horizontal = self.position.split("-")
        top = self.margin if vertical == "top" else height - self.size - self.margin
        left = self.margin if horizontal == "left" else width - self.size - self.margin
        return top, left

    def _patch(self) -> Tensor:
        if self.pattern == "checker":
            index = torch.arange(self.size)
            return ((index[:, None] + index[None, :]) % 2 == 0).float()
        return torch.full((self.size, self.size), 1.0 if self.pattern == "white" else 0.0)
