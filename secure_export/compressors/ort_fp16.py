"""Half precision by ONNX Runtime's converter: weights and arithmetic in float16, inputs and logits not."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.compressors._ort import half_weights, quantized
from secure_export.records.measured import Change


class OrtFp16(FileStep):
    """Half the bytes. CPUs without float16 kernels compute in float32 between casts, and are no faster."""

    keep: tuple[str, ...] = Field(
        (), description="operators that stay in float32, besides ONNX Runtime's own"
    )

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Convert the ONNX file `source` into `target`; counts the weight tensors that became float16.

        Raises:
            CompressError: no valid ONNX file, or it cannot be converted.
        """

        def convert(prepared: Path, written: Path) -> None:
            kept = [*DEFAULT_OP_BLOCK_LIST, *self.keep]
            proto = convert_float_to_float16(onnx.load(prepared), keep_io_types=True, op_block_list=kept)
            model = ONNXModel(proto)
            model.topological_sort()  # the converter appends its casts at the end
            onnx.save(model.model, written)

        return quantized(self.kind, source, target, convert, "float16", count=half_weights)
