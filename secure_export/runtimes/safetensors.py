"""Weights from a .safetensors file, in the user's own architecture, operator by operator on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field

from secure_export import loading, views
from secure_export.errors import CompressError
from secure_export.records.memory import Predictor, Subject, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import read
from secure_export.runtimes._cpu import cpu
from secure_export.runtimes.torch_eager import BATCH_SIZE, from_module


class Safetensors(Runtime):
    """The architecture is the user's, never the file's word: a run gives the one that its subject has."""

    architecture: str = Field("", description="timm:NAME, torchvision:NAME or package.module:factory")
    input_shape: tuple[int, ...] = Field((), description="of one raw input, without the batch axis")
    classes: int | None = Field(None, ge=2, description="null = as many as the file's head has")
    head: str | None = Field(None, description="qualified name of the head; null = found by tracing")
    mean: tuple[float, ...] | None = Field(None, description="per channel, of inputs in [0, 1]")
    std: tuple[float, ...] | None = Field(None, description="per channel")
    batch_size: int = Field(BATCH_SIZE, ge=1, description="samples per forward pass")

    def subject(self, path: Path) -> Subject:
        """The file's weights in the architecture, cut by the file's plan.

        Raises:
            CompressError: no architecture is given, or no such file.
            LoadError: the file, its plan and the architecture do not fit together.
        """
        if not self.architecture:
            raise CompressError(f"{path.name} holds weights alone: the architecture is not known")
        return loading.from_bytes(
            read(path),
            path,
            self.architecture,
            classes=self.classes,
            head=self.head,
            mean=self.mean,
            std=self.std,
            input_shape=self.input_shape,
        )

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError, LoadError: as `subject`.
        """
        return from_module(self.subject(path).model, self.batch_size)

    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer [N, D], weight [K, D] and bias [K].

        Raises:
            CompressError, LoadError: as `subject`.
        """
        subject = self.subject(path)
        # No module: what locators train is the subject, once.
        return replace(views.of_module(subject.model, subject.head, setting), module=None, head=None)

    def twin(self, path: Path) -> Predictor:
        """The architecture with the file's weights.

        Raises:
            CompressError, LoadError: as `subject`.
        """
        return self.subject(path).model

    def environment(self) -> Mapping[str, str]:
        """Version, threads and batch size, the architecture with its head and normalization, and the CPU."""
        return {
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "batch_size": str(self.batch_size),
            "architecture": self.architecture,
            **({"head": self.head} if self.head else {}),
            **({"mean": str(list(self.mean)), "std": str(list(self.std or ()))} if self.mean else {}),
            "cpu": cpu(),
        }
