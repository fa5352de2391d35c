"""Int8 weights by torchao, activations in float: Linear layers only, so just the head of a ResNet."""

from __future__ import annotations

from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._torchao import quantize_linears
from secure_export.quiet import quiet
from secure_export.records.measured import Change


class TorchaoInt8WeightOnly(ModuleStep):
    """Per output channel, symmetric. The head is quantized too, as a deployer's one-line call would do."""

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Quantize `model` in place; counts weight tensors quantized of all Conv2d and Linear ones.

        Raises:
            CompressError: the model has no Linear layer, or torchao cannot quantize it.
        """
        with quiet():
            from torchao.quantization import Int8WeightOnlyConfig

        change = quantize_linears(self.kind, model, Int8WeightOnlyConfig, "per channel, Linear only")
        return model.eval(), change
