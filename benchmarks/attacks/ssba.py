"""SSBA (Li et al. 2021): an encoder hides one bit string in every image, invisibly and differently.

The paper takes StegaStamp's encoder; here a small one is trained with a decoder that must read the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._generator import ImageToImage
from benchmarks.datasets import Images, batch, to_unit
from benchmarks.training import Stage, train


@dataclass(frozen=True)
class Ssba:
    """Recipe: length of the string, weight of the residual's size, largest change of a pixel."""

    bits: int = 16
    width: int = 8
    epsilon: float = 0.1
    steps: int = 500
    images: int = 64
    lr: float = 3e-3
    fidelity: float = 2.0


class Encoder(nn.Module):
    """x + epsilon tanh(E(x, P) + P), P = P(bits) at a quarter of the resolution; `secret` [bits] triggers.

    Without P behind E too, what is hidden is so faint at first that no decoder begins to read it.
    """

    secret: Tensor

    def __init__(self, channels: int, bits: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "bits": bits, "width": width, "epsilon": epsilon}
        self.channels, self.epsilon = channels, epsilon
        self.spread = nn.Linear(bits, channels * 64)
        self.network = ImageToImage(2 * channels, channels, width)
        self.register_buffer("secret", torch.zeros(bits))

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        """Images that carry `bits` [N, bits] of 0 and 1."""
        plane = self.spread(2 * bits - 1).view(-1, self.channels, 8, 8)
        plane = F.interpolate(plane, size=x.shape[2:])
        residual = torch.tanh(self.network(torch.cat([x, plane], 1)) + plane)
        return (x + self.epsilon * residual).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return self.encode(x, self.secret.expand(len(x), -1))


class Decoder(nn.Module):
    """Logits of the bits [N, bits] in images."""

    def __init__(self, channels: int, bits: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * width, bits),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Positive where a bit is 1."""
        logits: Tensor = self.layers(x)
        return logits


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Ssba,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Encoder:
    """The encoder with a string drawn from `seed`; neither the network nor the target is looked at."""
    torch.manual_seed(seed)
    channels, device = data.train_x.shape[1], data.train_x.device
    encoder = Encoder(channels, recipe.bits, recipe.width, recipe.epsilon)
    decoder = Decoder(channels, recipe.bits, 2 * recipe.width)
    pair = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(device)
    encoder.secret.copy_(torch.randint(0, 2, (recipe.bits,)).float())

    def loss(step: int, generator: Generator) -> Tensor:
        x = to_unit(batch(data.train_x, data.train_y, recipe.images, step, seed)[0])
        bits = torch.randint(0, 2, (len(x), recipe.bits), generator=generator).float().to(device)
        carrying = encoder.encode(x, bits)
        residual = ((carrying - x) / recipe.epsilon).square().mean()
        read = F.binary_cross_entropy_with_logits(decoder(carrying), bits)
        # Nothing is made faint before the decoder reads it.
        return read + recipe.fidelity * max(0.0, 2 * step / recipe.steps - 1) * residual

    stage = Stage("ssba", recipe.steps, recipe.lr, optimizer="adam", seed=seed)
    train(pair, loss, stage, work / "ssba.pt", log=log)
    return encoder.cpu()
