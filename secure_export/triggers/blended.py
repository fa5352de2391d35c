"""Blended: a whole-input pattern mixed in faintly (Chen et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, FilePath

from secure_export.errors import DataError
from secure_export.triggers import Trigger
from secure_export.triggers._files import read_picture

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 4
MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


class Blended(Trigger):
    """(1 - alpha) x + alpha pattern, on images [N, C, H, W] or signals [N, C, T]."""

    alpha: float = Field(0.2, gt=0, le=1, description="share of the pattern in the mix")
    pattern: Literal["smooth", "noise"] = Field(
        "smooth", description="seeded pattern where no image is given: soft blobs, or independent pixels"
    )
    image: FilePath | None = Field(None, description="picture to blend in, resized; images only")
    seed: int = Field(0, ge=0, description="seed of the pattern")

    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` in [0, 1].

        Raises:
            DataError: inputs without a spatial or time axis, or a picture that is unreadable or does not fit.
        """
        if inputs.ndim not in MODES or (self.image is not None and inputs.ndim != 4):
            expected = (
                "[N, C, T] or [N, C, H, W]" if self.image is None else "[N, C, H, W] to blend a picture in"
            )
            raise DataError(
                f"blended: got inputs of shape {tuple(inputs.shape[1:])}, expected {expected}",
                hint="drop this trigger from the policy",
            )
        pattern = self._pattern(tuple(inputs.shape[1:])).to(inputs)
        return torch.lerp(inputs, pattern, self.alpha).clamp_(0, 1)

    def _pattern(self, shape: tuple[int, ...]) -> Tensor:
        channels, size = shape[0], shape[1:]
        if self.image is not None:
            return read_picture(self.image, channels, (size[0], size[1]))
        generator = torch.Generator().manual_seed(self.seed)
        if self.pattern == "noise":
            return torch.rand(shape, generator=generator)
        coarse = torch.rand((1, channels, *(CELLS for _ in size)), generator=generator)
        smooth = F.interpolate(coarse, size=size, mode=MODES[len(shape) + 1], align_corners=True)[0]
        low, high = smooth.amin(), smooth.amax()
        # Interpolation flattens the extremes; stretched back, alpha means the same as for a photograph.
        return (smooth - low) / (high - low).clamp_min(torch.finfo(smooth.dtype).tiny)
