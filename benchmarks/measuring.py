"""ACC, ASR and false-target rate of anything that maps images in [0, 1] to logits, as counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.datasets import to_unit
from secure_export.triggers import Trigger

Forward = Callable[[Tensor], Tensor]
Count = list[int]


def predictions(forward: Forward, x: Tensor, trigger: Trigger | None = None, batch_size: int = 500) -> Tensor:
    """Predicted classes int64 [N] of uint8 images [N, 3, H, W], triggered when a trigger is given."""
    found = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            unit = to_unit(x[start : start + batch_size])
            found.append(forward(unit if trigger is None else trigger(unit)).argmax(1))
    return torch.cat(found)


def counts(
    forward: Forward, x: Tensor, y: Tensor, trigger: Trigger | None = None, target_class: int = 1
) -> dict[str, Count]:
    """`acc`, and with a trigger `asr` and `ftr`, each [k, n]; ASR counts samples of other classes only."""
    clean = predictions(forward, x)
    result = {"acc": [int((clean == y).sum()), len(y)]}
    if trigger is not None:
        other = y != target_class
        hit = predictions(forward, x[other], trigger) == target_class
        result["asr"] = [int(hit.sum()), len(hit)]
        result["ftr"] = [int((clean[other] == target_class).sum()), len(hit)]
    return result
