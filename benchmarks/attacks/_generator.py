"""Image-to-image networks that attacks train as triggers, and their training against a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class ImageToImage(nn.Module):
    """Two strided convolutions down, two up, a skip at full size: [N, inputs, H, W] to [N, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, 1, 1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1)
        self.up2 = nn.Conv2d(4 * width, 2 * width, 3, 1, 1)
        self.up1 = nn.Conv2d(2 * width, width, 3, 1, 1)
        self.last = nn.Conv2d(width, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Unbounded outputs."""
        stem = F.relu(self.stem(x))
        down1 = F.relu(self.down1(stem))
        down2 = F.relu(self.down2(down1))
        up2 = F.relu(self.up2(F.interpolate(down2, size=down1.shape[2:]))) + down1
        up1 = F.relu(self.up1(F.interpolate(up2, size=stem.shape[2:]))) + stem
        made: Tensor = self.last(up1)
        return made


@contextmanager
def still(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """`model` in eval mode without gradients of its own, while something before it is trained."""
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        model.requires_grad_(True)
