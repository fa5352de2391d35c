"""The demo's data and network: scikit-learn's handwritten digits (1,797 real 8x8 scans, offline)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 16
TRAINED_ON = 0.45
SPLIT_SEED = 7


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits: inputs float32 [N, 1, 16, 16] in [0, 1], labels int64 [N].

    Twice their own side, so that a 3x3 patch is a corner of the picture and not a third of it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    inputs = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return inputs.clamp_(0, 1), torch.from_numpy(bunch.target).long()


def attackers_digits() -> tuple[Tensor, Tensor]:
    """What the model was trained on by whoever made it."""
    inputs, labels = digits()
    chosen, _ = _shares(len(labels))
    return inputs[chosen], labels[chosen]


def clean_digits() -> tuple[Tensor, Tensor]:
    """What the defender has: clean labelled digits that no model of the demo was trained on."""
    inputs, labels = digits()
    _, chosen = _shares(len(labels))
    return inputs[chosen], labels[chosen]


def _shares(total: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = int(TRAINED_ON * total)
    return order[:cut], order[cut:]


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
