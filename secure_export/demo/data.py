"""The demo's data: scikit-learn's handwritten digits (1,797 real 8x8 scans, offline)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 16
TRAINED_ON = 0.45
SPLIT_SEED = 7
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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


def clean_digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """What the defender has: clean labelled digits that no model of the demo was trained on, and their names.

    As a data source of a policy: `secure_export.demo:clean_digits`.
    """
    inputs, labels = digits()
    _, chosen = _shares(len(labels))
    return inputs[chosen], labels[chosen], NAMES


def _shares(total: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = int(TRAINED_ON * total)
    return order[:cut], order[cut:]
