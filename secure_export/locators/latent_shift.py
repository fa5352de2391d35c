"""Latent shift: into which class does the smallest common move of the last hidden layer carry samples?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from secure_export.least_distance import shortest
from secure_export.locators._collapse import SparesRuins
from secure_export.records.measured import COLLAPSED, MIN_SCORE, UNREAD, Suspect
from secure_export.records.memory import Progress, Split, View, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FEWEST_CLASSES = 4
"""With fewer, the median of the norms is no reference for the smallest."""


class LatentShift(SparesRuins):
    """TAC's quadratic programme (arXiv 2511.08944), with a quantile in place of the maximum over samples.

    For each class k: the shortest s with (w_k - w_j) s >= Q_i{z_j - z_k} for all j != k over samples with
    y != k. A backdoor makes a short way into its target: score_k = log(median_j |s_j| / |s_k|). The maximum
    over samples (the published form) follows single outliers.
    """

    quantile: float = Field(0.95, gt=0.5, le=1, description="share of samples that the shift carries into k")
    min_score: float = Field(0.2, gt=0, description="naming a class takes this score; see docs/locators.md")
    min_gap: float = Field(0.1, gt=0, description="and this log ratio of second smallest to smallest norm")
    min_agreement: float = Field(0.8, gt=0, le=1, description="and this share of bootstraps naming it too")
    bootstraps: int = Field(20, ge=1, description="resamples of the fit images")

    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """Name the class with the shortest shift when it stands out; a collapsed model names none."""
        latents = view.latents(fit.floats()).double().cpu().numpy()
        weight, bias = view.weight.double().cpu().numpy(), view.bias.double().cpu().numpy()
        labels = fit.labels.numpy()
        logits = latents @ weight.T + bias
        norms = shift_norms(weight, logits, labels, self.quantile)
        progress("locate", 1, self.bootstraps + 1)
        scores = log_ratios(norms)
        named = int(norms.argmin())
        second, smallest = np.partition(norms, 1)[1], norms[named]
        gap = float(np.log(second / smallest))
        agreement = self._agreement(weight, logits, labels, named, seed, progress)
        ruin = self.collapse(torch.from_numpy(logits), fit.labels)
        stands_out = (
            scores[named] >= self.min_score and gap >= self.min_gap and agreement >= self.min_agreement
        )
        few = weight.shape[0] < FEWEST_CLASSES
        why = f"with fewer than {FEWEST_CLASSES} classes the median norm is no reference"
        return Suspect(
            locator=self.kind,
            setting=view.setting,
            target_class=named if stands_out and not ruin[COLLAPSED] and not few else None,
            scores=tuple(float(score) for score in scores),
            evidence={
                "smallest": named,
                "score": float(scores[named]),
                "gap": gap,
                "agreement": agreement,
                MIN_SCORE: self.min_score,
                **ruin,
                **({UNREAD: why} if few else {}),
            },
        )

    def _agreement(
        self, weight: Array, logits: Array, labels: Array, named: int, seed: int, progress: Progress
    ) -> float:
        generator = np.random.default_rng(seed)
        agreed = 0
        for done in range(self.bootstraps):
            index = generator.integers(0, len(labels), len(labels))
            agreed += int(shift_norms(weight, logits[index], labels[index], self.quantile).argmin()) == named
            progress("locate", done + 2, self.bootstraps + 1)
        return agreed / self.bootstraps


def shift_norms(weight: Array, logits: Array, labels: Array, quantile: float) -> Array:
    """|s_k| [K] of a head [K, D] from logits [N, K]; never below 1e-6 of the largest."""
    classes = weight.shape[0]
    norms = np.zeros(classes)
    for k in range(classes):
        others = np.arange(classes) != k
        need = logits[labels != k]
        if len(need) == 0:  # a bootstrap may hold one class only
            norms[k] = np.inf
            continue
        wanted = np.quantile(need[:, others] - need[:, [k]], quantile, axis=0)
        norms[k] = least_distance(weight[k] - weight[others], wanted)
    finite = norms[np.isfinite(norms)]
    return np.maximum(norms, 1e-6 * (finite.max() if finite.size else 1.0) + 1e-12)


def least_distance(rows: Array, wanted: Array) -> float:
    """min |s| subject to rows s >= wanted; inf when no s does it.

    s lies in the span of the rows, so the QR factor takes the place of a latent space that may be far wider.
    """
    found = shortest(np.transpose(np.linalg.qr(rows.T, mode="r")), wanted)
    return float("inf") if found is None else float(np.linalg.norm(found))


def log_ratios(norms: Array) -> Array:
    """log(median / norm) per class; the median is over classes that can be reached at all."""
    finite = norms[np.isfinite(norms)]
    reference = np.median(finite) if finite.size else 1.0
    ceiling = 1e6 * reference
    return np.log(reference / np.minimum(norms, ceiling))
