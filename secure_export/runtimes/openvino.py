"""OpenVINO on the CPU, in float32 where the file does not say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from secure_export.errors import CompressError
from secure_export.openvino_files import unpacked
from secure_export.records.memory import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import check_head
from secure_export.runtimes._cpu import cpu
from secure_export.words import first_line

if TYPE_CHECKING:
    import openvino
    from torch import Tensor

PASSED = ("Reshape", "Squeeze", "ReduceMean", "Convert")
"""What may stand between the head and the logits."""


class Openvino(Runtime):
    """On CPUs with bfloat16 units OpenVINO would round to that by itself; here it does not."""

    libraries: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"

    threads: int = Field(0, ge=0, description="threads of one inference; 0 leaves it to OpenVINO")
    batch_size: int = Field(256, ge=1, description="samples per run")

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no such file, or OpenVINO cannot run it.
        """
        return self._predictor(unpacked(path), path.name)

    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer [N, D], weight [K, D] and bias [K], dequantized, from the graph in the file.

        Raises:
            CompressError: the logits come from no matrix product or 1x1 convolution with the file's weights.
        """
        import openvino

        model = unpacked(path)
        data, weight, bias = self._head(model, path.name)
        hidden = self._predictor(openvino.Model([data], model.get_parameters()), path.name)

        def latents(inputs: Tensor) -> Tensor:
            values = hidden(inputs)
            return values.flatten(2).mean(2) if values.ndim == 4 else values

        shape = [size.get_length() for size in list(model.inputs[0].partial_shape)[1:]]
        noise = torch.rand((8, *shape), generator=torch.Generator().manual_seed(0))
        logits = self._predictor(model, path.name)(noise)
        check_head(latents(noise) @ weight.T + bias, logits, 1e-3, path.name)
        return View(setting=setting, latents=latents, weight=weight, bias=bias)

    def environment(self) -> Mapping[str, str]:
        """Version, device and options, and the CPU flags that choose the kernels."""
        import openvino

        return {
            "openvino": str(openvino.get_version()),
            "device": "CPU",
            "threads": str(self.threads),
            "batch_size": str(self.batch_size),
            "cpu": cpu(),
        }

    def _predictor(self, model: openvino.Model, file: str) -> Predictor:
        import openvino

        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if self.threads:
            options["INFERENCE_NUM_THREADS"] = self.threads
        try:
            compiled = openvino.Core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise CompressError(f"OpenVINO cannot open {file}: {first_line(error)}") from error

        def predict(inputs: Tensor) -> Tensor:
            if not len(inputs):
                return predict(torch.zeros(1, *inputs.shape[1:]))[:0]
            parts = []
            try:
                for batch in torch.split(inputs.float(), self.batch_size):
                    made = compiled([batch.contiguous().numpy()])[0]
                    parts.append(torch.from_numpy(made.copy()).float())
            except RuntimeError as error:
                raise CompressError(f"OpenVINO cannot run {file}: {first_line(error)}") from error
            return torch.cat(parts)

        return predict

    def _head(self, model: openvino.Model, file: str) -> tuple[Any, Tensor, Tensor]:
        """(what feeds the head, weight [K, D], bias [K])."""
        node, after = model.get_results()[0].input_value(0).get_node(), []
        while (kind := node.get_type_name()) not in ("MatMul", "Convolution"):
            way = node.input_value(0)
            if kind in ("Add", "Multiply"):
                moving = [value for value in node.input_values() if depends(value)]
                still = [value for value in node.input_values() if not depends(value)]
                if len(moving) != 1:
                    raise CompressError(f"cannot find the head of {file}: {kind} mixes two paths")
                way = moving[0]
                after.append((kind, self._constant(still[0], file).flatten()))
            elif kind not in PASSED:
                raise CompressError(
                    f"cannot find the head of {file}: {kind} stands between it and the logits",
                    hint="locators that read a file need a linear last layer",
                )
            node = way.get_node()
        weight = self._constant(node.input_value(1), file)
        if kind == "Convolution":
            if weight.shape[2:].numel() != 1:
                raise CompressError(f"cannot read the head of {file}: a convolution wider than 1x1")
            weight = weight.flatten(1)
        elif not node.get_attributes().get("transpose_b", False):
            weight = weight.T
        bias = torch.zeros(len(weight))
        for operator, value in reversed(after):
            if operator == "Add":
                bias = bias + value
            else:
                weight, bias = weight * value[:, None], bias * value
        return node.input_value(0), weight.contiguous(), bias

    def _constant(self, output: Any, file: str) -> Tensor:
        """The value, dequantized, of an output that no input reaches; OpenVINO itself computes it."""
        import openvino

        try:
            compiled = openvino.Core().compile_model(openvino.Model([output], []), "CPU")
            return torch.from_numpy(compiled([])[0].copy()).float()
        except RuntimeError as error:
            raise CompressError(f"cannot read the head of {file}: its weight depends on the input") from error


def depends(output: Any) -> bool:
    """Whether an output is computed from the model's input."""
    waiting, seen = [output.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return True
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            waiting.extend(value.get_node() for value in node.input_values())
    return False
