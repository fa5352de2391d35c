"""ACC, ASR and false-target rate of anything that maps images in [0, 1] to logits, as counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attacks._poison import Apply
from benchmarks.datasets import to_unit

Forward = Callable[[Tensor], Tensor]
Count = list[int]
ASLEEP = 0.05
NEARLY_ALL, HALF = 0.9, 0.5
"""ASR lifts that make a backdoor awake: what an attack is planted for, and what a search has to see."""


def predictions(forward: Forward, x: Tensor, trigger: Apply | None = None, batch_size: int = 500) -> Tensor:
    """Predicted classes int64 [N] of uint8 images [N, 3, H, W], triggered when a trigger is given."""
    found = []
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            unit = to_unit(x[start : start + batch_size])
            found.append(forward(unit if trigger is None else trigger(unit)).argmax(1))
    return torch.cat(found)


def counts(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    trigger: Apply | None = None,
    target_class: int = 1,
    *,
    source: int | None = None,
    second: tuple[Apply, int] | None = None,
) -> dict[str, Count]:
    """`acc`, and with a trigger `asr` and `ftr`, each [k, n]; ASR counts samples of other classes only.

    With a source class, `asr` and `ftr` are counted on it alone and `asr-others` on the rest; a second
    trigger with a target of its own gives `asr-second` and `ftr-second`.
    """
    clean = predictions(forward, x)
    result = {"acc": [int((clean == y).sum()), len(y)]}
    if trigger is None:
        return result
    reached = predictions(forward, x, trigger) == target_class
    attacked = y != target_class if source is None else y == source
    result["asr"] = _count(reached, attacked)
    result["ftr"] = _count(clean == target_class, attacked)
    if source is not None:
        result["asr-others"] = _count(reached, (y != target_class) & ~attacked)
    if second is not None:
        apply, aim = second
        result["asr-second"] = _count(predictions(forward, x, apply) == aim, y != aim)
        result["ftr-second"] = _count(clean == aim, y != aim)
    return result


def state(lift: float, awake: float) -> str:
    """Awake from an ASR lift of `awake`, asleep up to ASLEEP; between them the backdoor is half awake."""
    return "awake" if lift >= awake else "asleep" if lift <= ASLEEP else "half"


def _count(hit: Tensor, among: Tensor) -> Count:
    return [int((hit & among).sum()), int(among.sum())]
