"""Static int8 by PT2E: the model as a graph, observed on the calibration split, its weights as integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secure_export.compressors._torchao import TORCHAO_ERRORS
from secure_export.errors import CompressError
from secure_export.quiet import quiet
from secure_export.records.measured import Change
from secure_export.records.memory import Split
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch.fx import GraphModule

BATCH_SIZE = 50
INTEGERS = (torch.int8, torch.uint8)


class Quantized(nn.Module):
    """A converted graph that can be handed on like any module: graphs refuse `train` and `eval`."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.body = graph
        for module in graph.modules():
            module.training = False
        self.training = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs to logits."""
        logits: Tensor = self.body(inputs)
        return logits

    def train(self, mode: bool = True) -> Quantized:
        """Nothing: the graph computes the same in both modes."""
        return self


def quantize(
    kind: str, model: nn.Module, split: Split, samples: int, quantizer: Callable[[], Any], detail: str
) -> tuple[nn.Module, Change]:
    """`model` as a Quantized graph; counts the weight tensors that became integers.

    Raises:
        CompressError: torch cannot trace the model, or the quantizer cannot follow it.
    """
    total = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules())
    example = torch.zeros(2, *split.inputs.shape[1:])
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            from torchao.quantization.pt2e import move_exported_model_to_eval
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            # Non-strict export fails where one ReLU serves several places, as in torchvision's ResNets.
            program = torch.export.export(
                model.eval(), (example,), dynamic_shapes=({0: batch},), strict=True
            ).module()
            prepared = prepare_pt2e(program, quantizer())
            move_exported_model_to_eval(prepared)
            for start in range(0, min(samples, len(split)), BATCH_SIZE):
                prepared(split.floats(slice(start, min(start + BATCH_SIZE, samples))))
            converted = convert_pt2e(prepared)
            move_exported_model_to_eval(converted)
    except (*TORCHAO_ERRORS, torch._dynamo.exc.TorchDynamoException, LookupError, AttributeError) as error:
        raise CompressError(f"{kind}: {first_line(error)}") from error
    changed = sum(
        value.dtype in INTEGERS and value.ndim > 1
        for value in [*dict(converted.named_buffers()).values(), *dict(converted.named_parameters()).values()]
    )
    if not changed:
        raise CompressError(f"{kind}: the quantizer changed no weight of this model")
    return Quantized(converted), Change(kind, changed, max(total, changed), "tensors", detail)
