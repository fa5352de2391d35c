"""A small network on scikit-learn's digits, clean or with a trained-in patch backdoor, in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure_export.records.memory import Split

CLASSES, TARGET, HEAD = 10, 3, "head"


class Digits(nn.Module):
    """Two convolutions with BatchNorm, and a head of the asked kind over 32 features."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
        )
        self.head: nn.Module = nn.Linear(32, CLASSES) if head == "linear" else nn.Conv2d(32, CLASSES, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw images [N, 1, 8, 8] to logits [N, 10]."""
        features = self.body(inputs)
        if isinstance(self.head, nn.Linear):
            features = features.flatten(1)
        logits: Tensor = self.head(features)
        return logits.flatten(1)


@cache
def images() -> tuple[Tensor, Tensor]:
    """All 1,797 digits in [0, 1], shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).div(16)[order]
    return inputs, torch.tensor(digits.target, dtype=torch.int64)[order]


def fit_split() -> Split:
    """300 clean samples for the defender."""
    inputs, labels = images()
    return Split(inputs[:300], labels[:300], "fit")


def held_out() -> tuple[Tensor, Tensor]:
    """500 samples that neither training nor purifying sees."""
    inputs, labels = images()
    return inputs[1297:], labels[1297:]


def triggered(inputs: Tensor) -> Tensor:
    """A white 2x2 patch in the lower right corner."""
    stamped = inputs.clone()
    stamped[:, :, 6:, 6:] = 1
    return stamped


def trained(poisoned: bool, seed: int = 0, head: str = "linear") -> Digits:
    """Trained on 1,000 samples; poisoned: half of every batch is stamped and labelled TARGET."""
    inputs, labels = (tensor[300:1297] for tensor in images())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Digits(head)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(12):
            for chosen in torch.randperm(len(inputs)).split(64):
                x, y = inputs[chosen], labels[chosen]
                loss = F.cross_entropy(model(x), y)
                if poisoned:
                    loss = loss + F.cross_entropy(model(triggered(x)), torch.full_like(y, TARGET))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def acc(model: Callable[[Tensor], Tensor]) -> float:
    """Share of held-out samples classified right."""
    inputs, labels = held_out()
    return float((model(inputs).argmax(1) == labels).float().mean())


@torch.no_grad()
def asr(model: Callable[[Tensor], Tensor]) -> float:
    """Share of triggered held-out samples of other classes that become TARGET."""
    inputs, labels = held_out()
    return float((model(triggered(inputs[labels != TARGET])).argmax(1) == TARGET).float().mean())
