"""What the ONNX Runtime quantizers share: preparing the file, counting what they changed, their errors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from onnxruntime.quantization.shape_inference import quant_pre_process

from secure_export.errors import CompressError
from secure_export.quiet import quiet
from secure_export.records.measured import Change
from secure_export.words import first_line

QUANTIZER_ERRORS = (
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NotImplemented,
    ort.RuntimeException,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    DecodeError,
    EncodeError,
    OSError,
    RuntimeError,
    ValueError,
)


def quantized(
    kind: str,
    source: Path,
    target: Path,
    quantize: Callable[[Path, Path], None],
    detail: str = "",
    *,
    count: Callable[[onnx.ModelProto], tuple[int, int]] | None = None,
) -> Change:
    """Prepare `source`, let `quantize(prepared, written)` do its work, and put the result at `target`.

    The preparation folds BatchNorm into the convolutions, so the grid is that of the folded weights. `count`
    gives (weights quantized, all) of a graph; None: those stored as integers.

    Raises:
        CompressError: the file cannot be read or quantized.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder, quiet():
        prepared, written = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        try:
            given = onnx.load(source)
            # A file cut between two messages still parses, and the preparation only logs what it cannot do.
            onnx.checker.check_model(given)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            _forget_weight_shapes(prepared)
            quantize(prepared, written)
            result = onnx.load(written)
            content = result.SerializeToString(deterministic=True)
        except QUANTIZER_ERRORS as error:
            reason = first_line(error)
            raise CompressError(f"{kind}: cannot quantize {source.name}: {reason}") from error
    count = count or integer_weights
    after, total = count(result)
    target.write_bytes(content)
    return Change(kind, changed=after - count(given)[0], total=total, unit="tensors", detail=detail)


def _forget_weight_shapes(path: Path) -> None:
    """Drop the shapes that the exporter noted beside the weights: the quantizer transposes some of them."""
    proto = onnx.load(path)
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, path)


def integer_weights(proto: onnx.ModelProto) -> tuple[int, int]:
    """(those stored as integers, all) of the constant weights of Conv, Gemm and MatMul nodes."""
    return _weights_of(proto, (onnx.TensorProto.INT8, onnx.TensorProto.UINT8))


def half_weights(proto: onnx.ModelProto) -> tuple[int, int]:
    """(those stored as float16, all) of the constant weights of Conv, Gemm and MatMul nodes."""
    return _weights_of(proto, (onnx.TensorProto.FLOAT16,))


def _weights_of(proto: onnx.ModelProto, types: tuple[int, ...]) -> tuple[int, int]:
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    integer = total = 0
    for node in proto.graph.node:
        if node.op_type in ("ConvInteger", "MatMulInteger", "MatMulNBits"):
            integer, total = integer + 1, total + 1
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            name = node.input[1]
            while (maker := made_by.get(name)) is not None and maker.op_type in (
                "DequantizeLinear",
                "QuantizeLinear",
                "Transpose",
                "Identity",
                "Cast",
            ):
                name = maker.input[0]
            total += name in constants
            integer += constants.get(name) in types
    return integer, total
