"""Formats: the model as a file."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secure_export.registry import Plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class Format(Plugin):
    """(model, example) to a file."""

    suffix: ClassVar[str]
    runtime: ClassVar[str]
    """Name of the runtime that opens this file."""

    @abstractmethod
    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`; the batch axis of `example` is free.

        Raises:
            CompressError: this model cannot be written in this format.
        """
