"""Int8 weights and activations by torchao, activation scales taken from each row: Linear layers only.

Ships as .pt2; ONNX has no operator for it, and that export is refused.
"""

from __future__ import annotations

from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._torchao import quantize_linears
from secure_export.quiet import quiet
from secure_export.records.measured import Change


class TorchaoInt8Dynamic(ModuleStep):
    """Weights per output channel, activations per row, both symmetric; the head is quantized too."""

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Quantize `model` in place; counts weight tensors quantized of all Conv2d and Linear ones.

        Raises:
            CompressError: the model has no Linear layer, or torchao cannot quantize it.
        """
        with quiet():
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        # set_inductor_config would change the process for everything that runs after.
        change = quantize_linears(
            self.kind,
            model,
            lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
            "per channel and row, Linear only",
        )
        return model.eval(), change
