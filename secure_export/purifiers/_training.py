"""What every purifier shares: the head by name, batches, augmentation, and the record of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from secure_export.errors import DataError, LoadError

if TYPE_CHECKING:
    from torch import Tensor

    from secure_export.records.memory import Split

EVAL_BATCH = 256
WIDEST_VECTOR = 16
"""Floats in a vector of AVX-512; AVX2 has half."""


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """A generator for order and augmentation; dropout's global stream is seeded too and restored after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def find_head(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer that produces the logits.

    Raises:
        LoadError: no such layer, or neither a Linear nor a 1x1 Conv2d.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise LoadError(f"no layer {name!r} in the model", hint="name the head in subject.head") from error
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
        return layer
    raise LoadError(
        f"head {name!r}: got {type(layer).__name__}, expected a Linear or a 1x1 Conv2d",
        hint="name the layer that produces the logits in subject.head",
    )


def check_fit(fit: Split, target_class: int) -> None:
    """Both sides of the margin must be there.

    Raises:
        DataError: no sample of the target class, or none of another class.
    """
    own = int((fit.labels == target_class).sum())
    if own == 0 or own == len(fit):
        raise DataError(
            f"fit: {own} of {len(fit)} samples are of class {target_class}, expected some and not all",
            hint="give more clean samples to data.fit",
        )


def batches(fit: Split, size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """One shuffled pass: raw inputs [B, ...] and labels [B]; BatchNorm cannot train on a tiny last batch."""
    order = torch.randperm(len(fit), generator=generator)
    chunks = list(torch.split(order, size))
    if len(chunks) > 1 and len(chunks[-1]) < size // 2:
        chunks.pop()
    return [(fit.floats(chunk), fit.labels[chunk]) for chunk in chunks]


def margin(logits: Tensor, target_class: int) -> Tensor:
    """z_c - max_{j != c} z_j per sample [N]; negative where the target class does not win."""
    rivals = logits.clone()
    rivals[:, target_class] = -torch.inf
    return logits[:, target_class] - rivals.amax(1)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Eval-mode logits of raw inputs, in the mode the model came in afterwards."""
    training = model.training
    model.eval()
    found = torch.cat([model(batch) for batch in torch.split(inputs, EVAL_BATCH)])
    model.train(training)
    return found


@torch.no_grad()
def zero_columns(head: nn.Linear | nn.Conv2d, columns: Tensor) -> None:
    """Features `columns` of the last hidden layer, which then no class reads."""
    head.weight[:, columns] = 0


def epoch_record(
    model: nn.Module, fit: Split, target_class: int, phase: str, losses: Sequence[float], m1: float
) -> dict[str, float | str]:
    """History of one epoch: mean loss, accuracies and the margin of class c on clean samples with y != c."""
    logits = logits_of(model, fit.floats())
    hit = logits.argmax(1) == fit.labels
    own = fit.labels == target_class
    margins = margin(logits, target_class)[~own]
    return {
        "phase": phase,
        "loss": sum(losses) / max(1, len(losses)),
        "fit_acc": float(hit.float().mean()),
        "target_acc": float(hit[own].float().mean()),
        "margin": float(margins.mean()),
        "active": float((margins + m1 > 0).float().mean()),
    }


def sgd(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD over all of them; a model may come frozen."""
    trained = [parameter.requires_grad_(True) for parameter in parameters]
    return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)


@contextmanager
def channels_last(model: nn.Module, fit: Split) -> Iterator[None]:
    """Images are convolved twice as fast on CPUs with channels last in memory; row-major again afterwards."""
    chosen = fit.inputs.ndim == 4 and not any(map(_overruns, model.modules()))
    if chosen:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        if chosen:
            model.to(memory_format=torch.contiguous_format)


def _overruns(layer: nn.Module) -> bool:
    """Whether oneDNN writes past its memory in the layer's weight gradient with channels last.

    It does in 1x1 convolutions with a stride and fewer input channels than a vector holds (oneDNN #6035):
    what channel pruning leaves of a narrow network's shortcuts.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and set(layer.kernel_size) == {1}
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < WIDEST_VECTOR
    )
