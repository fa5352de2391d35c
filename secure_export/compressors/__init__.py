"""Compressors: what deployment may do to the model, as a module before it is written or as a file after."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secure_export.records.measured import Change
from secure_export.records.memory import Progress, Split, silent
from secure_export.registry import Plugin

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Context:
    """What a step may use besides the model: never the holdout, never a trigger."""

    head: str
    calibration: Split
    teacher: nn.Module
    """The full-precision model of this lane, untouched; `recover` distils from it."""
    seed: int
    progress: Progress = silent
    purify: Callable[[nn.Module], nn.Module] | None = None
    """Repeats this lane's purification on a compressed model; None where nothing was purified."""


class Compressor(Plugin):
    """One step of a setting; subclass `ModuleStep` or `FileStep`."""


class ModuleStep(Compressor):
    """A step on the module, before any file exists."""

    @abstractmethod
    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Compress `model` (the caller's copy: it may be changed); eval mode in and out.

        Raises:
            CompressError: this model cannot be compressed this way.
        """


class FileStep(Compressor):
    """A step on the written file."""

    works_on: ClassVar[str] = "onnx"
    """The format whose files it reads and writes."""

    @abstractmethod
    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Read the file `source`, write the compressed file `target`.

        Raises:
            CompressError: this file cannot be compressed this way.
        """
