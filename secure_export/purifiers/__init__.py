"""Purifiers: remove the backdoor that aims at a class. They see a copy of the model and the fit split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secure_export.records.memory import Progress, Purified, Split, silent
from secure_export.registry import Plugin

if TYPE_CHECKING:
    from torch import nn


class Purifier(Plugin):
    """(copy of model, class, fit) to a purified model and its history."""

    @abstractmethod
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
        """Purify `model` (the caller's copy: it may be changed) of a backdoor into `target_class`.

        `head` is the qualified name of the Linear or 1x1 Conv2d that produces the logits. The returned model
        is in eval mode.
        """


def class_after_class(
    purifier: Purifier,
    model: nn.Module,
    head: str,
    targets: Sequence[int],
    fit: Split,
    seed: int,
    progress: Progress,
) -> Purified:
    """`model` (it may be changed) purified of every class in turn; history rows name their class."""
    history: list[dict[str, float | int | str]] = []
    for target_class in targets:
        done = purifier.purify(model, head, target_class, fit, seed=seed, progress=progress)
        model = done.model
        history += [{"target_class": target_class, **epoch} for epoch in done.history]
    return Purified(model, tuple(history))
