"""The demo's classifier, small enough to train in seconds."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class DigitsCNN(nn.Module):
    """Three 3x3 convolutions with batch normalization, average pooling, a linear head."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        widths = (1, width, 2 * width, 2 * width)
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=1 if before == 1 else 2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for before, after in pairwise(widths)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], classes)

    def blocks(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution with its batch normalization, in order."""
        modules = list(self.features.modules())
        convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        return list(zip(convolutions, norms, strict=True))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, classes] of inputs [N, 1, H, W] in [0, 1]."""
        latents: Tensor = self.pool(self.features(inputs)).flatten(1)
        logits: Tensor = self.head(latents)
        return logits


def digits_cnn(classes: int = 10) -> DigitsCNN:
    """Factory for `--arch secure_export.demo:digits_cnn`."""
    return DigitsCNN(classes=classes)
