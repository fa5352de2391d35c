"""Int8 weights by torchao, activations in float: Linear layers only, so just the head of a ResNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._quiet import quiet
from secure_export.errors import CompressError
from secure_export.records import Change

if TYPE_CHECKING:
    from torch import Tensor


class TorchaoInt8WeightOnly(ModuleStep):
    """Per output channel, symmetric. The head is quantized too, as a deployer's one-line call would do."""

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Quantize `model` in place; counts weight tensors quantized of all Conv2d and Linear ones.

        Raises:
            CompressError: the model has no Linear layer, or torchao cannot quantize it.
        """
        with quiet():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        if not any(isinstance(layer, nn.Linear) for layer in layers):
            raise CompressError("torchao-int8-weight-only: the model has no Linear layer")
        before = sum(is_quantized(layer.weight) for layer in layers)
        try:
            quantize_(model, Int8WeightOnlyConfig())
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CompressError(f"torchao-int8-weight-only: {reason}") from error
        changed = sum(is_quantized(layer.weight) for layer in layers) - before
        return model.eval(), Change(self.kind, changed, len(layers), "tensors", "per channel, Linear only")


def is_quantized(weight: Tensor) -> bool:
    """Whether torchao put its own tensor type in the parameter's place."""
    return type(weight).__module__.startswith("torchao")
