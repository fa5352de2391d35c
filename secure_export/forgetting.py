"""Forgetting: a model that answers clean samples as the given one does, through weights that were moved and
trained back.

What the samples ask for is learned again; what they never ask for, such as a trigger, mostly is not. So the
result is a reference made on the spot: what is natural to task and network, both have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure_export.augmentation import augmented
from secure_export.errors import CompressError
from secure_export.precision import reduced
from secure_export.records.memory import Progress, Split, silent
from secure_export.twins import Twin

Weights = Mapping[str, Tensor]
TEMPERATURE = 2.0
WARMUP = 20
LARGEST_GRADIENT = 5.0
LEAST_RELEARNED = 0.92
"""Of the samples of fit that the model has right: a reference with less did not learn the task again, and
much that is natural would tell it from the model: on a narrow network that kept .75 to .88, clean ones raised
false alarms (docs/evidence-measured.md)."""


LONGEST = 600
"""Batches after which a reference that still knows too little is left so."""
JUDGES = 2
"""Forgetting is uneven: of stripes one reference kept .07 and the next .65 (docs/evidence-measured.md)."""


@dataclass(frozen=True)
class References:
    """Models that forgot, each in its own way: searches work against one, the others judge the finds."""

    avoided: Callable[[Tensor], Tensor]
    judges: tuple[Callable[[Tensor], Tensor], ...]


def weighted(
    twin: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Tensor], Callable[[Tensor, Weights], Tensor]]:
    """The weights of a twin, and its logits as a function of (inputs, weights).

    Raises:
        CompressError: its weights cannot be told from the rest.
    """
    if isinstance(twin, Twin):
        return twin.weights(), twin
    if isinstance(twin, nn.Module):
        return {name: p.detach() for name, p in twin.named_parameters()}, partial(_called, twin)
    raise CompressError("this twin's weights cannot be moved, so there is nothing to compare it with")


def _called(module: nn.Module, inputs: Tensor, weights: Weights) -> Tensor:
    made: Tensor = torch.func.functional_call(module, dict(weights), (inputs,))
    return made


def forgotten(
    twin: Callable[[Tensor], Tensor],
    fit: Split,
    *,
    noise: float,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Weights of the twin with every filter turned away, then distilled from the twin on variations of `fit`.

    `noise` is the size of the change, in standard deviations of each filter's weights; the filter keeps its
    norm. Crops, mirror images (of images that are large enough) and mixtures (Zhang et al. 2018) make new
    inputs of a few hundred; no label is read.

    Raises:
        CompressError: the twin has no weights that can be moved, or no gradient.
    """
    weights, call = weighted(twin)
    kept = twin.biases() if isinstance(twin, Twin) else {n for n, v in weights.items() if v.ndim < 2}
    if not weights.keys() - kept:
        raise CompressError("this twin holds no weights as floats, so there is nothing to compare it with")
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: (value.clone() if name in kept else _turned(value, noise, generator)).requires_grad_(True)
        for name, value in weights.items()
    }
    optimizer = torch.optim.Adam(moved.values(), lr=lr)
    inputs = fit.floats()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (1 - 0.95 * step / steps)
        mixed = _mixed(inputs, batch_size, generator)
        with reduced():
            with torch.no_grad():
                answers = twin(mixed).float()
            own = call(mixed, moved).float()
        wanted, said = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (answers, own))
        loss = TEMPERATURE**2 * F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        gradients = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
        for value, gradient in zip(moved.values(), gradients, strict=True):
            value.grad = gradient
        torch.nn.utils.clip_grad_norm_(moved.values(), LARGEST_GRADIENT)
        optimizer.step()
        progress("forget", step + 1, steps)
    return {name: value.detach() for name, value in moved.items()}


def relearned(
    make: Callable[[int], Weights],
    twin: Callable[[Tensor], Tensor],
    fit: Split,
    *,
    steps: int,
    longest: int = LONGEST,
    least: float = LEAST_RELEARNED,
) -> Weights:
    """What `make` gives after `steps`, anew after twice as many and so on: the first that knows enough again.

    Where none does up to `longest` it is the last, and references() says what is wrong with it.
    """
    _, call = weighted(twin)
    inputs = fit.floats()
    enough = least * _right(twin, inputs, fit.labels)
    made = make(steps)
    while _right(partial(_reweighted, call, made), inputs, fit.labels) < enough and 2 * steps <= longest:
        steps *= 2
        made = make(steps)
    return made


@torch.no_grad()
def _right(logits: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> float:
    """Share of samples that a model has right."""
    return float((logits(inputs).argmax(1) == labels).double().mean())


@torch.no_grad()
def references(
    twin: Callable[[Tensor], Tensor],
    forgetful: Sequence[Weights],
    fit: Split,
    least: float = LEAST_RELEARNED,
) -> References:
    """The twin with weights that forgot, once all have proved to know the task again; the first is avoided.

    Raises:
        CompressError: one of them has less than `least` of what the twin has right on fit.
    """
    _, call = weighted(twin)
    made: list[Callable[[Tensor], Tensor]] = [partial(_reweighted, call, one) for one in forgetful]
    inputs = fit.floats()
    before, *after = (_right(logits, inputs, fit.labels) for logits in (twin, *made))
    if min(after) < least * before:
        raise CompressError(
            f"a reference has {min(after):.0%} of fit right, the model {before:.0%}: too little to compare",
            hint="let it learn again for more steps, or give it less noise",
        )
    return References(made[0], tuple(made[1:]))


def _reweighted(call: Callable[[Tensor, Weights], Tensor], weights: Weights, inputs: Tensor) -> Tensor:
    return call(inputs, weights)


def _turned(value: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Every row of a weight [out, ...], or the only one there is, moved and brought back to its norm."""
    rows = value.flatten(1) if value.ndim > 1 and value.shape[0] < value.numel() else value.reshape(1, -1)
    added = rows + noise * rows.std(1, keepdim=True) * torch.randn(rows.shape, generator=generator)
    scale = rows.norm(dim=1, keepdim=True) / added.norm(dim=1, keepdim=True).clamp(min=1e-12)
    turned: Tensor = (added * scale).view_as(value)
    return turned


def _mixed(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, ...] samples, every second one mixed with another."""
    first, second = (torch.randint(0, len(inputs), (count,), generator=generator) for _ in range(2))
    first, second = (augmented(inputs[index], "auto", True, generator) for index in (first, second))
    share = torch.rand(count, *[1] * (inputs.ndim - 1), generator=generator)
    share[::2] = 1
    return share * first + (1 - share) * second
