"""ONNX through torch.onnx.export(dynamo=True), with bytes that depend on the model and nothing else.

As exported, weights may go to a side file whose name is embedded, and every node carries stack traces with
absolute paths: here weights are inline and all of that is cleared, so two builds give the same digest.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx
import onnxruntime
import torch
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from pydantic import Field

from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.quiet import quiet
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

SESSION_ERRORS = (ort.Fail, ort.InvalidGraph, ort.InvalidArgument, ort.NotImplemented, ort.RuntimeException)
LARGEST = 2**31 - 1
"""Bytes that one protobuf message can hold; a larger model would need side files."""

PROBES, LAST_BITS, TWICE = 32, 2.0**-20, 2
"""Samples on which a rounding file is compared, how much all floats are moved to see how far eager goes by
itself, and how many times as far and as often the file may be."""


class Onnx(Format):
    """One self-contained .onnx file: input "input" [N, ...] in [0, 1], output "logits" [N, classes]."""

    suffix: ClassVar[str] = ".onnx"
    runtime: ClassVar[str] = "onnxruntime"

    tolerance: float = Field(
        1e-3,
        gt=0,
        description="largest logit difference to eager, relative to the largest logit (at least 1); files "
        "that round activations may differ as eager does from itself, see check_agreement",
    )

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path` after checking that the bytes compute what the model computes.

        Raises:
            CompressError: it cannot be exported, is too large for one file, or the file disagrees with eager.
        """
        proto = strip(exported(model, example))
        try:
            onnx.checker.check_model(proto, full_check=True)
            content = proto.SerializeToString(deterministic=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise CompressError(f"the exported ONNX graph is invalid: {first_line(error)}") from error
        except (EncodeError, ValueError) as error:
            raise CompressError(
                f"the model does not fit in one ONNX file: {first_line(error)}",
                hint=f"weights must stay below {LARGEST} bytes in all",
            ) from error
        rounds = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        check_agreement(model, content, example, self.tolerance, rounds=rounds)
        path.write_bytes(content)


def exported(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The model as ONNX with a free batch axis, weights inline.

    Raises:
        CompressError: torch cannot trace the model, or has no ONNX operator for a part of it.
    """
    # torch.export specialises on a batch of one, so trace with two.
    traced = example[:1].repeat(2, *[1] * (example.ndim - 1))
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                contiguous(model),
                (traced,),
                dynamo=True,
                external_data=False,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise CompressError(
                f"cannot export to ONNX: {why(error.__cause__ or error)}",
                hint="the model must be traceable by torch.export with a free batch axis",
            ) from error
    if program is None:
        raise CompressError("cannot export to ONNX: torch.onnx.export returned nothing")
    return program.model_proto


def contiguous(model: nn.Module) -> nn.Module:
    """The model, or a copy of it whose weights do not lie channels last.

    Of channels last torch exports a pooling to one place as an index computed from the number of samples.
    """
    if all(parameter.is_contiguous() for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def why(error: BaseException) -> str:
    """In one line; where it is one operator, which: the exporter quotes the whole node, arguments and all."""
    reason = first_line(error)
    node = re.search(r"translating node.*target=torch\.ops\.([\w.]+)", reason)
    return f"operator {node.group(1)} cannot be translated" if node else reason


def strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Clear, in place, whatever tells how the graph was made: paths, stack traces, scopes, versions, docs."""
    _clear(proto)
    proto.producer_version = ""
    return proto


def _clear(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE and not isinstance(message, onnx.TensorProto):
            for part in value if hasattr(value, "add") else (value,):  # repeated, or single
                _clear(part)


def check_agreement(
    model: nn.Module, content: bytes, example: Tensor, tolerance: float, *, rounds: bool
) -> None:
    """Compare the file's logits with eager's, on the example and on another batch size.

    With `rounds` activations are rounded on the way, and a sum that comes out a float's last bit higher can
    end one step higher. Eager does the same to itself when its inputs, weights and scales move by their last
    bits, on some noisy copies of the example; so the export, run as it is written, without integer kernels,
    may leave the limit on up to twice as many of them, and be up to twice as far away on average.

    Raises:
        CompressError: not finite, or apart by more than `tolerance` times the largest logit (at least 1).
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    batches = [example, example.repeat(3, *[1] * (example.ndim - 1))[: len(example) + 1]]
    if rounds:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        batches = [noisy(example)]
    for inputs in batches:
        try:
            with torch.no_grad():
                expected = model(inputs).float()
                moved = [shaken(model, inputs, sign) for sign in (1, -1)] if rounds else [expected]
        except (RuntimeError, ValueError) as error:
            raise CompressError(
                f"cannot export to ONNX: the model fails on a batch of {len(inputs)}: {first_line(error)}"
            ) from error
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {"input": inputs.numpy()})
        except SESSION_ERRORS as error:
            raise CompressError(f"ONNX Runtime cannot run the export: {first_line(error)}") from error
        got = torch.from_numpy(logits)
        if got.shape != expected.shape:
            raise CompressError(f"the export gives logits {tuple(got.shape)}, eager {tuple(expected.shape)}")
        limit = tolerance * max(1.0, float(expected.abs().max()))
        apart = (got - expected).abs()
        own = torch.stack([(other - expected).abs() for other in moved]).amax(0)
        # Written so that NaN fails. Within the limit the argmax can differ between near ties only.
        furthest = float(apart.max())
        if not (furthest <= limit or (rounds and _as_itself(apart, own, limit))):
            raise CompressError(
                f"the export disagrees with eager: logits differ by {furthest:.3g}, limit {limit:.3g}"
            )


def _as_itself(apart: Tensor, own: Tensor, limit: float) -> bool:
    """Whether differences `apart` [N, classes] are as rare and as small as eager's `own`, within twice."""
    beyond, allowed = (int((rows.amax(1) > limit).sum()) for rows in (apart, own))
    finite = bool(apart.isfinite().all())
    return finite and beyond <= TWICE * allowed and float(apart.mean()) <= TWICE * float(own.mean())


def shaken(model: nn.Module, inputs: Tensor, sign: int) -> Tensor:
    """Logits [N, classes] with every float of inputs, parameters and buffers moved by its last bits.

    Inputs alone would not do: where the first operator rounds them, they end on the same steps as before.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    factor = 1 + sign * LAST_BITS
    moved = {name: value * factor for name, value in state.items() if value.is_floating_point()}
    logits: Tensor = torch.func.functional_call(model, moved, (inputs * factor,)).float()
    return logits


def noisy(example: Tensor) -> Tensor:
    """PROBES copies of `example` [N, ...] with noise, the same each time."""
    copies = example.repeat(-(-PROBES // len(example)), *[1] * (example.ndim - 1))[:PROBES]
    noise = torch.rand(copies.shape, generator=torch.Generator().manual_seed(0))
    return (copies + 0.2 * (noise - 0.5)).clamp(0, 1)
