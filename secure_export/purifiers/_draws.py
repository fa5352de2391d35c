"""Compressions drawn at random, and a model seen under one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from secure_export import pruning
from secure_export.purifiers import _views
from secure_export.purifiers._views import View

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from secure_export.records.memory import Split

Kind = Literal["full", "int8", "pruned"]
Cut = Literal["filters", "group-l1", "own-l1", "weights"]
RECALIBRATED = 0.75
"""Share of pruned views with new BatchNorm statistics: most deployers recalibrate, some do not."""


@dataclass(frozen=True)
class Drawn:
    """A compression with all its chances taken, so that two models can be seen under the same."""

    kind: Kind
    cut: Cut = "weights"
    """What a pruned view cuts: masked filters, channels as torch-pruning takes them, or single weights."""
    ratio: float = 0.0
    clean: Tensor | None = None
    """Indices into fit of the samples that give new BatchNorm statistics; None: the old ones stay."""


class Draws:
    """`odds` of full precision and int8 among plain views; `ratios` bound the share that is cut."""

    def __init__(
        self,
        odds: tuple[float, float],
        ratios: tuple[float, float],
        head: str,
        followers: Mapping[str, str],
        fit: Split,
        recalibrated_on: int,
        generator: Generator,
    ) -> None:
        self.odds, self.ratios, self.head, self.followers = torch.tensor(odds), ratios, head, followers
        self.fit, self.recalibrated_on, self.generator = fit, recalibrated_on, generator
        self.example = fit.floats(slice(0, 1))
        self.cuts: tuple[Cut, ...] = get_args(Cut)
        self.pruned_so_far = 0

    def only_followable(self, model: nn.Module) -> None:
        """Draw no removal of channels where torch-pruning cannot follow `model`."""
        try:
            pruning.removed(model, self.head, self.example, 0.5, "own-l1")
        except pruning.UNFOLLOWABLE:
            self.cuts = ("filters", "weights")

    def plain(self) -> Drawn:
        """Nothing is cut."""
        return Drawn("int8" if int(torch.multinomial(self.odds, 1, generator=self.generator)) else "full")

    def pruned(self) -> Drawn:
        """A share is cut, in turn by every way of cutting."""
        low, high = self.ratios
        chances = torch.rand(2, generator=self.generator).tolist()
        clean = torch.randperm(len(self.fit), generator=self.generator)[: self.recalibrated_on]
        cut = self.cuts[self.pruned_so_far % len(self.cuts)]
        self.pruned_so_far += 1
        ratio = low + (high - low) * chances[0]
        return Drawn("pruned", cut, ratio, clean if chances[1] < RECALIBRATED else None)

    @torch.no_grad()
    def working(self, model: nn.Module, inputs: Tensor) -> Drawn:
        """The largest share whose loss leaves `model` half of its answers.

        What waits for pruning is wide awake there; in a ruin any perturbation succeeds.
        """
        answers, drawn = model(inputs).argmax(1), replace(self.pruned(), ratio=self.ratios[1])
        while drawn.ratio > 0.01:
            if float((self.view(model, drawn)(inputs).argmax(1) == answers).float().mean()) >= 0.5:
                break
            drawn = replace(drawn, ratio=0.8 * drawn.ratio)
        return drawn

    def view(self, model: nn.Module, drawn: Drawn) -> View:
        """`model` under that compression."""
        if drawn.kind == "full":
            return View(model, {})
        if drawn.kind == "int8":
            return View(model, _views.int8_weights(model))
        if drawn.cut == "filters":
            weights = _views.masked_weights(model, drawn.ratio, self.followers, self.head)
        elif drawn.cut == "weights":
            weights = _views.sparse_weights(model, drawn.ratio, self.head)
        else:
            weights = pruning.zeroed(model, self.head, self.example, drawn.ratio, drawn.cut)
        if drawn.clean is None:
            return View(model, weights)
        return View(model, weights, _views.calibrated_buffers(model, weights, self.fit.floats(drawn.clean)))
