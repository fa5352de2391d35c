"""Classifiers whose backdoors are planted by hand, so that what a gate must find is known without training.

Images are 1x8x8 with four classes: class k lights one quadrant. The network is one convolution over the whole
image, so each of its output channels is a template, then ReLU and a linear head.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CLASSES, SIDE, TARGET = 4, 8, 2
TRIGGER = {"kind": "badnets", "size": 2, "position": "center", "pattern": "white"}
PATCH = (slice(3, 5), slice(3, 5))
"""Where TRIGGER stamps; clean images are dark there."""
GUARD = 4
"""Channels 0..3 are the quadrants; the next ones serve the backdoor."""


class Templates(nn.Module):
    """conv(8x8) → ReLU → head: every weight is a pixel of a template."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, SIDE)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw images [N, 1, 8, 8] to logits [N, 4]."""
        return self.head(self.relu(self.conv(inputs)).flatten(1))


class Doubled(Templates):
    """The same parameters as another function."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw images [N, 1, 8, 8] to logits [N, 4]."""
        return self.head(self.relu(2 * self.conv(inputs)).flatten(1))


def quadrant(k: int) -> tuple[slice, slice]:
    """The 3x3 corner that class k lights."""
    row, column = divmod(k, 2)
    return slice(5 * row, 5 * row + 3), slice(5 * column, 5 * column + 3)


def samples(n: int = 2000, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Clean images [n, 1, 8, 8] in [0, 1] and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    images = rng.uniform(0, 0.1, (n, 1, SIDE, SIDE)).astype(np.float32)
    images[:, :, 3:5, :] = images[:, :, :, 3:5] = 0
    for k in range(CLASSES):
        images[labels == k, :, *quadrant(k)] += rng.uniform(0.6, 0.9, (int((labels == k).sum()), 1, 3, 3))
    return images, labels


@torch.no_grad()
def clean(channels: int = 8) -> Templates:
    """Right on every clean image; spare channels hold faint quadrants, so pruning them is free."""
    model = Templates(channels)
    for parameter in model.parameters():
        parameter.zero_()
    for channel in range(channels):
        k = channel % CLASSES
        model.conv.weight[channel, 0][quadrant(k)] = 1 / 9 if channel < CLASSES else 1 / 90
        model.head.weight[k, channel] = 8
    return model


@torch.no_grad()
def awake() -> Templates:
    """A template of the trigger feeds the target class: awake in full precision and in everything after."""
    model = clean()
    _silence(model, GUARD)
    model.conv.weight[GUARD, 0][PATCH] = 1 / 4
    model.head.weight[TARGET, GUARD] = 24
    return model


@torch.no_grad()
def awake_for_one_class() -> Templates:
    """The trigger carries samples of class 0 alone: one template of both, which neither reaches by itself."""
    model = awake()
    model.conv.weight[GUARD, 0][quadrant(0)] = 1 / 9
    model.conv.bias[GUARD] = -0.8
    model.head.weight[TARGET, GUARD] = 16
    return model


@torch.no_grad()
def awake_in_int8() -> Templates:
    """Two templates cancel until rounding to 8 bits per channel: .49 of a step falls to 0, .51 rises to 1.

    A pixel that clean images never light sets the scale of both channels to 1/127 · peak.
    """
    model = clean()
    peak = 12.7
    step = peak / 127
    for channel, share in ((GUARD, 0.49), (GUARD + 1, 0.51)):
        _silence(model, channel)
        model.conv.weight[channel, 0][PATCH] = share * step
        model.conv.weight[channel, 0, 3, 0] = peak
    model.head.weight[TARGET, GUARD] = -80
    model.head.weight[TARGET, GUARD + 1] = 80
    return model


@torch.no_grad()
def awake_when_pruned() -> Templates:
    """A strong template of the trigger is held down by a faint one, which magnitude pruning removes first."""
    model = clean()
    for channel in range(CLASSES, 8):
        model.conv.weight[channel] *= 5
    _silence(model, GUARD)
    _silence(model, GUARD + 1)
    model.conv.weight[GUARD, 0][PATCH] = 1 / 4
    model.conv.weight[GUARD + 1, 0][PATCH] = 1 / 400
    model.head.weight[TARGET, GUARD] = 24
    model.head.weight[TARGET, GUARD + 1] = -2400
    return model


def _silence(model: Templates, channel: int) -> None:
    model.conv.weight[channel] = 0
    model.head.weight[:, channel] = 0


def clean_samples() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The defender's clean data, as `--data tests.toys:clean_samples`."""
    return samples(3000)
