"""What the torchao steps share: quantizing a model's Linear layers in place, and counting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from secure_export.errors import CompressError
from secure_export.quiet import quiet
from secure_export.records.measured import Change
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor

TORCHAO_ERRORS = (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError)


def quantize_linears(kind: str, model: nn.Module, config: Callable[[], Any], detail: str) -> Change:
    """Apply torchao's `config()` to `model` in place; counts weight tensors of all Conv2d and Linear ones.

    Raises:
        CompressError: the model has no Linear layer, or torchao cannot quantize it.
    """
    with quiet():
        from torchao.quantization import quantize_

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if not any(isinstance(layer, nn.Linear) for layer in layers):
        raise CompressError(f"{kind}: the model has no Linear layer")
    before = sum(is_quantized(layer.weight) for layer in layers)
    try:
        with quiet():
            quantize_(model, config())
    except TORCHAO_ERRORS as error:
        raise CompressError(f"{kind}: {first_line(error)}") from error
    changed = sum(is_quantized(layer.weight) for layer in layers) - before
    return Change(kind, changed, len(layers), "tensors", detail)


def is_quantized(weight: Tensor) -> bool:
    """Whether torchao put its own tensor type in the parameter's place."""
    return type(weight).__module__.startswith("torchao")
