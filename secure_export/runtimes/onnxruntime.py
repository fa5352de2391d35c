"""ONNX Runtime on the CPU: the bytes that ship, run with the options that they ship with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from pydantic import Field

from secure_export.errors import CompressError
from secure_export.records import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import check_head, first_line, read
from secure_export.runtimes._cpu import cpu
from secure_export.runtimes._head import affine, find_head, with_parts

if TYPE_CHECKING:
    from torch import Tensor

PROVIDER = "CPUExecutionProvider"
SESSION_ERRORS = (
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoModel,
    ort.NotImplemented,
    ort.RuntimeException,
)
LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class Onnxruntime(Runtime):
    """CPU execution provider. The optimization level moves int8 logits: measure with the one that ships."""

    optimization: Literal["all", "extended", "basic", "disabled"] = Field(
        "all", description="graph optimization level of the session"
    )
    intra_op_threads: int = Field(
        0, ge=0, description="threads inside an operator; 0 leaves it to ONNX Runtime"
    )
    batch_size: int = Field(
        256, ge=1, description="samples per run; dynamic int8 takes its scales from the batch, so it matters"
    )

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no such file, no valid ONNX, several inputs, or an unknown operator.
        """
        session = self._session(read(path), path.name)
        if len(session.get_inputs()) != 1:
            raise CompressError(f"{path.name} has {len(session.get_inputs())} inputs, expected one")
        output = session.get_outputs()[0].name
        return lambda inputs: self._run(session, inputs, output, path.name)

    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer [N, D], weight [K, D] and bias [K] of the file itself, dequantized.

        Rounding of the logits behind the head is left out. For dynamic int8 the hidden layer is the one
        before its rounding, which depends on the batch.

        Raises:
            CompressError: the logits do not come from a Gemm, MatMul or 1x1 Conv, or the parts that were read
                do not reproduce the file's logits.
        """
        self.open(path)  # a file cut between two messages still parses as a graph, but does not open
        try:
            proto = onnx.load_from_string(read(path))
        except DecodeError as error:
            raise CompressError(f"{path.name} is no valid ONNX file: {first_line(error)}") from error
        head = find_head(proto, path.name)
        copy, logits = with_parts(proto, head)
        session = self._session(copy, path.name)

        def latents(inputs: Tensor) -> Tensor:
            hidden = self._run(session, inputs, head.data, path.name)
            return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden

        noise = torch.rand(
            (8, *session.get_inputs()[0].shape[1:]), generator=torch.Generator().manual_seed(0)
        )
        constants = {name: self._run(session, noise[:1], name, path.name) for name in head.constants}
        weight, bias = affine(head, constants)
        check_head(
            latents(noise) @ weight.T + bias,
            self._run(session, noise, logits, path.name).flatten(1),
            # Data rounded on the fly is off by up to 1/255 of its range.
            0.05 if head.integer else 1e-3,
            path.name,
        )
        return View(setting=setting, latents=latents, weight=weight, bias=bias)

    def environment(self) -> Mapping[str, str]:
        """Version, provider and options, and the CPU flags that choose the int8 kernels."""
        return {
            "onnxruntime": onnxruntime.__version__,
            "provider": PROVIDER,
            "optimization": self.optimization,
            "intra_op_threads": str(self.intra_op_threads),
            "batch_size": str(self.batch_size),
            "cpu": cpu(),
        }

    def _session(self, content: bytes, file: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.intra_op_threads
        options.graph_optimization_level = LEVELS[self.optimization]
        try:
            return onnxruntime.InferenceSession(content, options, providers=[PROVIDER])
        except SESSION_ERRORS as error:
            raise CompressError(f"ONNX Runtime cannot open {file}: {first_line(error)}") from error

    def _run(self, session: onnxruntime.InferenceSession, inputs: Tensor, output: str, file: str) -> Tensor:
        """One output over all inputs, in batches, as float32."""
        name = session.get_inputs()[0].name
        parts = []
        try:
            for start in range(0, max(len(inputs), 1), self.batch_size):
                batch = inputs[start : start + self.batch_size].float().contiguous().numpy()
                parts.append(torch.from_numpy(session.run([output], {name: batch})[0]))
        except SESSION_ERRORS as error:
            raise CompressError(f"ONNX Runtime cannot run {file}: {first_line(error)}") from error
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
