"""The classification head, found by what it computes and not by its name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from secure_export.errors import LoadError
from secure_export.factories import local_code

BATCH = 4
NAME_IT = "give subject.head, the qualified name of the layer that produces the logits"


def find(model: nn.Module, input_shape: tuple[int, ...], head: str | None = None) -> tuple[str, int]:
    """Qualified name of the Linear or 1x1 Conv2d whose output is the logits, and the number of classes.

    A convolution's output is averaged over positions. `head` names the layer; it is checked too.

    Raises:
        LoadError: no such layer or several (the message lists the candidates), or the outputs are no logits.
    """
    batch = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    logits = _logits(model, batch)
    layers = _candidates(model, logits.shape[1])
    outputs = _outputs(model, layers, batch)
    found = [name for name, seen in outputs.items() if any(_gives(_same, output, logits) for output in seen)]
    if head is not None:
        named = [name for name in (head, f"model.{head}") if name in found]
        if named:
            return named[0], logits.shape[1]
        raise LoadError(f"head {head!r} does not produce the logits", hint=_listed(found or list(outputs)))
    if len(found) == 1:
        return found[0], logits.shape[1]
    if found:
        raise LoadError(f"{len(found)} layers produce the logits: {', '.join(found)}", hint=NAME_IT)
    clipped = [name for name, seen in outputs.items() if any(_gives(torch.relu, out, logits) for out in seen)]
    if clipped:
        raise LoadError(
            f"head {clipped[0]} is followed by a ReLU: the logits are not linear in the last features",
            hint="the head must come last; such a model cannot be purified or located here",
        )
    raise LoadError("no Linear or 1x1 Conv2d produces the logits", hint=_listed(list(outputs)))


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    shape = list(batch.shape[1:])
    with local_code(f"the model cannot take inputs of shape {shape}", LoadError), torch.no_grad():
        logits = model(batch)
    if not isinstance(logits, Tensor):
        raise LoadError(f"the model gives a {type(logits).__name__}, expected one tensor of logits")
    if logits.ndim != 2 or logits.shape[0] != len(batch):
        raise LoadError(
            f"the model gives outputs of shape {list(logits.shape)}, expected [{len(batch)}, classes]"
        )
    if logits.shape[1] < 2:
        raise LoadError(f"the model has {logits.shape[1]} output, expected one per class, at least 2")
    if not logits.isfinite().all():
        raise LoadError("the model gives logits that are not finite on random inputs")
    return logits


def _candidates(model: nn.Module, classes: int) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == classes)
        or (
            isinstance(module, nn.Conv2d)
            and module.out_channels == classes
            and module.kernel_size == (1, 1)
            and module.groups == 1
        )
    }


def _outputs(model: nn.Module, layers: dict[str, nn.Module], batch: Tensor) -> dict[str, list[Tensor]]:
    """What each layer that ran gave, in the order of running."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # A copy, because an in-place activation would rewrite what the hook saw.
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(output.detach().clone())

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(keep(name)))
        model(batch)
    return seen


def _same(output: Tensor) -> Tensor:
    return output


def _gives(then: Callable[[Tensor], Tensor], output: Tensor, logits: Tensor) -> bool:
    """Whether `output`, passed through `then` and averaged over positions, is the logits."""
    output = then(output)
    averaged = output.flatten(2).mean(2) if output.ndim == 4 else output
    return averaged.shape == logits.shape and torch.allclose(averaged, logits, rtol=1e-4, atol=1e-5)


def _listed(names: list[str]) -> str:
    return f"layers with as many outputs: {', '.join(names) or 'none'}"
