"""What flows in memory: models, samples and what may look at them. Holds tensors, so none of it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secure_export import digests

if TYPE_CHECKING:
    from torch import Tensor, nn


Predictor = Callable[["Tensor"], "Tensor"]
"""Raw inputs [N, ...] in [0, 1] to logits [N, classes], float32 on the CPU."""


Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); the command line turns it into a bar with the time left."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress of callers that want none."""


@dataclass(frozen=True)
class Subject:
    """The model under test: eval mode, normalization inside, raw inputs to logits."""

    model: nn.Module
    input_shape: tuple[int, ...]
    """Of one raw input in [0, 1], without the batch axis: data, triggers, files and runtimes share it."""
    classes: int
    head: str
    """Qualified name, inside `model`, of the Linear or 1x1 Conv2d that produces the logits."""
    sha256: str
    """Of the checkpoint file, taken before it was opened."""
    architecture: str
    answers: str
    """Digest of its logits on fixed noise, which tell code from edited code."""
    source: Path

    @cached_property
    def identity(self) -> str:
        """What the ledger keeps results under: the same file is another function in another architecture, at
        another head or behind another normalization, whose moments are buffers of the model."""
        built = [self.architecture, self.answers, self.classes, self.head, repr(self.model)]
        return digests.of_json([self.sha256, built, digests.of_state(self.model.state_dict())])


@dataclass(frozen=True)
class Split:
    """Clean labelled samples. `inputs` is uint8 (0..255) or float32 ([0, 1]), [N, ...]; labels int64 [N]."""

    inputs: Tensor
    labels: Tensor
    sha256: str

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def floats(self, index: Any = slice(None)) -> Tensor:
        """Inputs at `index` as float32 in [0, 1], which is what every model and trigger takes."""
        chosen = self.inputs[index]
        return chosen if chosen.is_floating_point() else chosen.float().div_(255)


@dataclass(frozen=True)
class Splits:
    """Disjoint: defences see `fit`, compression sees `calibration`, only measuring sees `holdout`."""

    fit: Split
    calibration: Split
    holdout: Split
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """What a locator may look at: the last hidden layer and the head of one setting's weights.

    logits = latents(inputs) @ weight.T + bias. `module` is a trainable copy (None where only a file exists)
    and `head` the qualified name of its head. `twin` gives logits with gradients to the inputs (None where a
    file has no differentiable twin).
    """

    setting: str
    latents: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor
    module: nn.Module | None = None
    head: str | None = None
    twin: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Purified:
    """A purifier's model and, per epoch, what the figures need: phase, loss, margins, accuracy on fit."""

    model: nn.Module
    history: tuple[Mapping[str, float | int | str], ...]
