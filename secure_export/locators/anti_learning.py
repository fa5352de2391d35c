"""Anti-learning: unlearn the clean task and see which class is left (Yang et al., CVPR 2026, eq. 3 and 4)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.errors import NoVerdict
from secure_export.locators import Locator
from secure_export.records.measured import ALWAYS_NAMES, Suspect
from secure_export.records.memory import Progress, Split, View, silent

if TYPE_CHECKING:
    from torch import Tensor, nn


class AntiLearning(Locator):
    """Maximise cross-entropy on clean samples, then take the class with the largest mean log posterior.

    It names a class for every model, clean ones included, and clean leads overlap with those of weak
    backdoors: the evidence tells the lead and the agreement of the restarts, and neither is a verdict.
    """

    needs_module: ClassVar[bool] = True

    lr: float = Field(0.01, gt=0, description="SGD; RNP's unlearning rate, the paper gives none")
    momentum: float = Field(0.9, ge=0, lt=1)
    steps: int = Field(30, ge=1, description="at most this many batches a restart")
    batch_size: int = Field(128, ge=2)
    clip: float = Field(5.0, gt=0, description="bound on the gradient norm: the loss has no minimum")
    stop_at: float = Field(1.5, gt=0, description="stop at a batch accuracy of this multiple of chance")
    restarts: int = Field(3, ge=1, description="other orders of the samples; the majority names the class")

    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """Always names a class; `scores` are eq. 4's log posteriors averaged over restarts.

        Raises:
            NoVerdict: the view has no trainable module (a compressed file).
        """
        if view.module is None:
            raise NoVerdict(
                f"anti-learning needs a trainable model, {view.setting!r} is a file",
                hint="run it on the full-precision subject",
            )
        rows = []
        for restart in range(self.restarts):
            model = copy.deepcopy(view.module)
            rows.append(self._log_posteriors(model, fit, seed + restart))
            progress("locate", restart + 1, self.restarts)
        stacked = torch.stack(rows)
        means = stacked.mean(0)
        votes = torch.bincount(stacked.argmax(1), minlength=means.numel())
        # Ties of the vote go to the larger mean posterior.
        named = int(max(range(means.numel()), key=lambda c: (int(votes[c]), float(means[c]))))
        rivals = torch.cat([means[:named], means[named + 1 :]])
        return Suspect(
            locator=self.kind,
            setting=view.setting,
            target_class=named,
            scores=tuple(means.tolist()),
            evidence={
                "lead": float(means[named] - rivals.max()),
                "agreement": int(votes[named]) / self.restarts,
                "restarts": self.restarts,
                ALWAYS_NAMES: True,
            },
        )

    def _log_posteriors(self, model: nn.Module, fit: Split, seed: int) -> Tensor:
        """s(c) of eq. 4 after one unlearning run.

        BatchNorm takes batch statistics throughout: with stored ones the logits explode and one class takes
        the whole posterior on clean models too.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            model.train()
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
            for _ in range(self.steps):
                chosen = torch.randperm(len(fit), generator=generator)[: self.batch_size]
                logits = model(fit.floats(chosen))
                labels = fit.labels[chosen]
                if (logits.argmax(1) == labels).float().mean() <= self.stop_at / logits.shape[1]:
                    break
                optimizer.zero_grad()
                (-F.cross_entropy(logits, labels)).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
            with torch.no_grad():
                parts = [
                    F.log_softmax(model(batch), 1) for batch in torch.split(fit.floats(), self.batch_size)
                ]
        return torch.cat(parts).mean(0)
