"""Triggers: what an attacker would add to an input, in raw input space, deterministic."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from secure_export.registry import Plugin

if TYPE_CHECKING:
    from torch import Tensor


class Trigger(Plugin):
    """Raw inputs to triggered inputs."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` (float32 [N, ...] in [0, 1], same shape and range out)."""
