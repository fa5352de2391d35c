"""Compressions drawn at random, and a model seen under one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from secure_export.purifiers import _views
from secure_export.purifiers._views import View

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from secure_export.records.memory import Split

Kind = Literal["full", "int8", "pruned"]
KINDS: tuple[Kind, ...] = ("full", "int8", "pruned")
RECALIBRATED = 0.75
"""Share of pruned views with new BatchNorm statistics: most deployers recalibrate, some do not."""


@dataclass(frozen=True)
class Drawn:
    """A compression with all its chances taken, so that two models can be seen under the same."""

    kind: Kind
    channels: bool
    """Whether whole channels are cut, or single weights."""
    ratio: float
    clean: Tensor | None
    """Indices into fit of the samples that give new BatchNorm statistics; None: the old ones stay."""


class Draws:
    """`odds` of full precision, int8 and pruned; `ratios` bound the share that is cut."""

    def __init__(
        self,
        odds: tuple[float, float, float],
        ratios: tuple[float, float],
        head: str,
        followers: Mapping[str, str],
        fit: Split,
        recalibrated_on: int,
        generator: Generator,
    ) -> None:
        self.odds, self.ratios, self.head, self.followers = torch.tensor(odds), ratios, head, followers
        self.fit, self.recalibrated_on, self.generator = fit, recalibrated_on, generator

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Those that can be drawn."""
        return tuple(kind for kind, odds in zip(KINDS, self.odds.tolist(), strict=True) if odds)

    def draw(self, kind: Kind | None = None) -> Drawn:
        """One of the compressions, of `kind` if it is given."""
        if kind is None:
            kind = KINDS[int(torch.multinomial(self.odds, 1, generator=self.generator))]
        low, high = self.ratios
        chances = torch.rand(3, generator=self.generator).tolist()
        clean = torch.randperm(len(self.fit), generator=self.generator)[: self.recalibrated_on]
        return Drawn(
            kind,
            channels=chances[0] < 0.5,
            ratio=low + (high - low) * chances[1],
            clean=clean if chances[2] < RECALIBRATED else None,
        )

    @torch.no_grad()
    def working(self, model: nn.Module, inputs: Tensor, kind: Kind | None = None) -> Drawn:
        """A compression that leaves `model` half of its answers: in a ruin any perturbation succeeds."""
        drawn, answers = self.draw(kind), model(inputs).argmax(1)
        while drawn.kind == "pruned" and drawn.ratio > 0.01:
            if float((self.view(model, drawn)(inputs).argmax(1) == answers).float().mean()) >= 0.5:
                break
            drawn = replace(drawn, ratio=drawn.ratio / 2)
        return drawn

    def view(self, model: nn.Module, drawn: Drawn) -> View:
        """`model` under that compression."""
        if drawn.kind == "full":
            return View(model, {})
        if drawn.kind == "int8":
            return View(model, _views.int8_weights(model))
        if drawn.channels:
            weights = _views.masked_weights(model, drawn.ratio, self.followers, self.head)
        else:
            weights = _views.sparse_weights(model, drawn.ratio, self.head)
        if drawn.clean is None:
            return View(model, weights)
        return View(model, weights, _views.calibrated_buffers(model, weights, self.fit.floats(drawn.clean)))
