"""Weights on the sphere of their initial norm: where D3 searches, and where a fresh head is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor


def projected(weight: Tensor, like: Tensor, p: float = 2.0) -> Tensor:
    """`weight` scaled so that its Lp norm is that of `like`; a zero weight stays zero."""
    norm = weight.norm(p)
    return weight * (like.norm(p) / norm) if norm > 0 else weight.clone()


def fresh(like: Tensor, generator: Generator, p: float = 2.0) -> Tensor:
    """U(-0.5, 0.5), scaled to the Lp norm of `like`."""
    drawn = torch.rand(like.shape, generator=generator) - 0.5
    return projected(drawn.to(like), like, p)
