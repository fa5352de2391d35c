"""Runtimes: a file as a function from raw inputs to logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from secure_export import registry
from secure_export.errors import CompressError
from secure_export.records.memory import Predictor, View
from secure_export.registry import Plugin

Options = Mapping[str, Mapping[str, Any]]
"""By the name of a runtime, how it opens files in this run."""


class Runtime(Plugin):
    """file to Predictor, and to the View that locators read."""

    reads_heads: ClassVar[bool] = True
    """False where the file is compiled: locators then read the same steps in another format."""

    @abstractmethod
    def open(self, path: Path) -> Predictor:
        """The file as a function.

        Raises:
            CompressError: the runtime cannot run this file.
        """

    @abstractmethod
    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer and head, read from the file itself.

        Raises:
            CompressError: the head cannot be found in this file.
        """

    def twin(self, path: Path) -> Predictor:
        """As `open`, in torch and with gradients to the inputs: the file's own weights and rounding.

        Raises:
            CompressError: there is none for such files, or for a part of this one.
        """
        raise CompressError(f"no differentiable twin of {path.name}: none for {self.kind} files")

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Version, provider and options, for the report."""


def runtime(kind: str, options: Options) -> Runtime:
    """The runtime called `kind` with its own of `options`.

    Raises:
        PolicyError: its library is not installed.
    """
    return registry.build(Runtime, "runtimes", {"kind": kind, **options.get(kind, {})})
