"""The frame of the published defences: checks, seeds, passes over fit and their record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export.augmentation import Augment, augmented
from secure_export.purifiers import Purifier, _training
from secure_export.records.memory import Progress, Purified, Split, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    Record = dict[str, float | str]
    Step = Callable[["Tensor", "Tensor"], float]


@dataclass
class Work:
    """What a defence is handed, and the history that it leaves."""

    model: nn.Module
    """Changed in place."""
    head_name: str
    target_class: int
    fit: Split
    generator: torch.Generator
    progress: Progress
    batch_size: int
    augment: Augment
    flip: bool
    history: list[Record] = field(default_factory=list)

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The layer that produces the logits."""
        return _training.find_head(self.model, self.head_name)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled, augmented pass: raw inputs [B, ...] and labels [B]."""
        for inputs, labels in _training.batches(self.fit, self.batch_size, self.generator):
            yield augmented(inputs, self.augment, self.flip, self.generator), labels

    def passes(self, phase: str, count: int, step: Step, model: nn.Module | None = None) -> Iterator[Record]:
        """`count` passes of step(inputs, labels) -> loss; yields the record of each, of `model` if given."""
        for done in range(count):
            losses = [step(inputs, labels) for inputs, labels in self.batches()]
            yield self.record(phase, losses, model)
            self.progress(f"purify: {phase}", done + 1, count)

    def record(self, phase: str, losses: list[float], model: nn.Module | None = None) -> Record:
        """Add a row to the history."""
        row = _training.epoch_record(model or self.model, self.fit, self.target_class, phase, losses, 0.0)
        self.history.append(row)
        return row


class Published(Purifier):
    """A defence that trains on shuffled, augmented batches of fit."""

    batch_size: int = Field(256, ge=2, description="BackdoorBench's, like its 100 passes")
    augment: Augment = Field("auto", description="crop and flip; auto: images of at least 24 pixels a side")
    flip: bool = Field(True, description="mirror images; false where mirroring changes the label (digits)")

    @abstractmethod
    def remove(self, work: Work) -> None:
        """Purify `work.model` in place."""

    def purify(
        self,
        model: nn.Module,
        head: str,
        target_class: int,
        fit: Split,
        *,
        seed: int,
        progress: Progress = silent,
    ) -> Purified:
        """Purify `model` on `fit`, by this class's equations.

        Raises:
            DataError: fit holds no sample of the target class, or no other.
            LoadError: `head` is no Linear or 1x1 Conv2d.
        """
        _training.find_head(model, head)
        _training.check_fit(fit, target_class)
        model.requires_grad_(True)
        with _training.seeded(seed) as generator, _training.channels_last(model, fit):
            work = Work(
                model, head, target_class, fit, generator, progress, self.batch_size, self.augment, self.flip
            )
            self.remove(work)
        return Purified(model.eval(), tuple(work.history))


class FineTuned(Published):
    """SGD over all parameters with a cosine to 0 over the passes: BackdoorBench's protocol."""

    lr: float = Field(0.01, gt=0, description="initial learning rate; decays to 0 along a cosine")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    epochs: int = Field(100, ge=1, description="passes over fit")

    def tune(
        self,
        work: Work,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        after_step: Callable[[], None] = lambda: None,
        *,
        phase: str,
    ) -> None:
        """Minimize loss_of(inputs, labels) in train mode; `after_step` projects the weights."""
        optimizer = _training.sgd(work.model.parameters(), self.lr, self.momentum, self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)

        def step(inputs: Tensor, labels: Tensor) -> float:
            loss = loss_of(inputs, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after_step()
            return loss.item()

        work.model.train()
        for _ in work.passes(phase, self.epochs, step):
            schedule.step()
