"""Trigger-activated changes, reconstructed (Iwahana et al., arXiv 2511.08944), and unlearned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export import views
from secure_export.errors import DataError
from secure_export.least_distance import shortest
from secure_export.purifiers._work import FineTuned, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Array = NDArray[np.float64]


class Tac(FineTuned):
    """Fine-tunes with the least shift of the last features that makes every clean sample the target class.

    s_k = argmin ||s||^2 / 2 subject to (w_k - w_j) (s + z_i) + b_k - b_j >= 0 for all j != k and samples i.
    s is shared, so the samples collapse into one bound per j: K - 1 constraints, solved in their dual. The
    paper then tests which class has a small norm; here a locator names the class, and the history says how
    far its norm lies below the others' median, in scaled median deviations. What could be read of the paper
    leaves the fine-tuning open: here CE(f(x), y) + beta CE(head(z + s_c), y), in BackdoorBench's protocol.
    """

    beta: float = Field(1.0, ge=0, description="weight of the loss under the shift (the paper tunes it)")
    quantile: float = Field(
        1.0, gt=0, le=1, description="share of the samples that the shift must carry; 1 is the paper's"
    )

    def remove(self, work: Work) -> None:
        """Solve for every class, note the target's norm, fine-tune under its shift."""
        shifts = [self.shift(work, k) for k in range(work.head.weight.shape[0])]
        norms = [float(shift.norm()) for shift in shifts]
        row = work.record("identify", [])
        row |= {"shift_norm": norms[work.target_class], "smallness": smallness(norms, work.target_class)}
        shift = shifts[work.target_class]

        with last_features(work.head) as seen:

            def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
                logits = work.model(inputs)
                moved = shifted(work.head, seen[0], shift)
                return F.cross_entropy(logits, labels) + self.beta * F.cross_entropy(moved, labels)

            self.tune(work, loss_of, phase="fine-tune")

    def shift(self, work: Work, k: int) -> Tensor:
        """s_k [D] of the present model over fit.

        Raises:
            DataError: no shift carries the samples into the class.
        """
        head = work.head
        latents = views.latents(work.model.eval(), head, work.fit.floats()).double().numpy()
        weight = head.weight.detach().flatten(1).double().numpy()
        bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
        found = least_shift(weight, bias, latents, k, self.quantile)
        if found is None:
            raise DataError(
                f"no shift of the last features gives class {k}", hint="its head row equals another class's"
            )
        return torch.from_numpy(found).to(head.weight)


def least_shift(weight: Array, bias: Array, latents: Array, k: int, quantile: float = 1.0) -> Array | None:
    """s_k [D] for a head [K, D] over latents [N, D]; None where no shift does it."""
    others = np.arange(len(weight)) != k
    rows = weight[k] - weight[others]
    missing = latents @ (weight[others] - weight[k]).T + (bias[others] - bias[k])
    return shortest(rows, np.quantile(missing, quantile, axis=0))


def smallness(norms: list[float], k: int) -> float:
    """(median - |s_k|) / (1.4826 MAD): above 2, the class stands out as small (Iglewicz and Hoaglin)."""
    found = np.array(norms)
    deviation = 1.4826 * float(np.median(np.abs(found - np.median(found))))
    return (float(np.median(found)) - norms[k]) / max(deviation, 1e-12)


@contextmanager
def last_features(head: nn.Linear | nn.Conv2d) -> Iterator[list[Tensor]]:
    """A list whose one item is the head's latest input, with its graph."""
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, args: seen.__setitem__(slice(None), [args[0]])):
        yield seen


def shifted(head: nn.Linear | nn.Conv2d, latents: Tensor, shift: Tensor) -> Tensor:
    """Logits [N, K] with `shift` added to the head's input; a 1x1 convolution is averaged over positions."""
    logits: Tensor = head(latents + shift.view(1, -1, *[1] * (latents.ndim - 2)))
    return logits.flatten(2).mean(2) if logits.ndim == 4 else logits
