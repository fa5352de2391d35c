"""ONNX Runtime on the CPU: the bytes that ship, run with the options that they ship with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from pydantic import Field

from secure_export import twins
from secure_export.errors import CompressError
from secure_export.records.memory import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import check_head, read
from secure_export.runtimes._cpu import cpu
from secure_export.runtimes._head import affine, find_head, with_parts
from secure_export.runtimes._isolated import IsolatedSession
from secure_export.words import first_line, printable

if TYPE_CHECKING:
    from torch import Tensor

Session: TypeAlias = onnxruntime.InferenceSession | IsolatedSession

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
EXACT_PRODUCTS = "session.x64quantprecision"
"""Makes int8 weights uint8 in memory where the CPU has no VNNI, so that sums do not saturate."""
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
    precise: bool = Field(
        False,
        description="exact sums of uint8 x int8 products on x86 without VNNI, where they saturate otherwise "
        "(session.x64quantprecision); the deploying session has to ask for it too",
    )
    isolated: bool = Field(
        False, description="in a process of its own with bounded memory and time, for files of unknown origin"
    )
    gigabytes: float = Field(4.0, gt=0, description="memory that an isolated session may take")
    seconds: float = Field(
        120.0, gt=0, description="that an isolated session may take to open, and per batch"
    )
    mean: tuple[float, ...] = Field(
        (), description="per channel, taken off the inputs before the file sees them"
    )
    std: tuple[float, ...] = Field((), description="per channel; the inputs are divided by it")

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no such file, no valid ONNX, several inputs, or an unknown operator.
        """
        session = self._session(read(path), path.name)
        given = session.get_inputs()
        if len(given) != 1:
            raise CompressError(f"{path.name} has {len(given)} inputs, expected one")
        if given[0].type not in DTYPES:
            raise CompressError(
                f"{path.name} takes {given[0].type}, expected floats", hint="inputs are floats in [0, 1]"
            )
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
        # What is an output too cannot be rewritten for exact products; unoptimized, products are floats.
        reading = {"optimization": "disabled", "precise": False} if self.precise else {}
        session = self.model_copy(update=reading)._session(copy, path.name)

        def latents(inputs: Tensor) -> Tensor:
            hidden = self._run(session, inputs, head.data, path.name)
            return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden

        batch, *shape = session.get_inputs()[0].shape or (None,)
        if not shape or not all(isinstance(size, int) for size in shape):
            raise CompressError(f"{path.name} does not say the size of its inputs: {printable(str(shape))}")
        noise = torch.rand((8, *shape), generator=torch.Generator().manual_seed(0))
        one = noise[:1].expand(batch if isinstance(batch, int) else 1, *shape)
        constants = {name: self._run(session, one, name, path.name) for name in head.constants}
        weight, bias = affine(head, constants)
        check_head(
            latents(noise) @ weight.T + bias,
            self._run(session, noise, logits, path.name).flatten(1),
            # Data rounded on the fly is off by up to 1/255 of its range.
            0.05 if head.integer else 1e-3,
            path.name,
        )
        twin = None
        if not self.mean:
            with suppress(CompressError):
                twin = self.twin(path)
        return View(setting, latents, weight, bias, twin=twin)

    def twin(self, path: Path) -> Predictor:
        """The file's graph with gradients, behind the normalization that this runtime does in its place.

        Raises:
            CompressError: no readable ONNX, or an operator that has no twin.
        """
        twin = twins.of_onnx(path)
        return (lambda inputs: twin(self._raw(inputs))) if self.mean else twin

    def environment(self) -> Mapping[str, str]:
        """Version, provider and options, and the CPU flags that choose the int8 kernels."""
        return {
            "onnxruntime": onnxruntime.__version__,
            "provider": PROVIDER,
            "optimization": self.optimization,
            "intra_op_threads": str(self.intra_op_threads),
            "batch_size": str(self.batch_size),
            **({"precise": "True"} if self.precise else {}),
            **({"isolated": f"{self.gigabytes:g} GiB, {self.seconds:g} s"} if self.isolated else {}),
            **({"mean": str(list(self.mean)), "std": str(list(self.std))} if self.mean else {}),
            "cpu": cpu(),
        }

    def _session(self, content: bytes, file: str) -> Session:
        config = {EXACT_PRODUCTS: "1"} if self.precise else {}
        if self.isolated:
            return IsolatedSession(
                content,
                file,
                level=LEVELS[self.optimization].value,
                threads=self.intra_op_threads,
                config=config,
                provider=PROVIDER,
                gigabytes=self.gigabytes,
                seconds=self.seconds,
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.intra_op_threads
        options.graph_optimization_level = LEVELS[self.optimization]
        for name, value in config.items():
            options.add_session_config_entry(name, value)
        try:
            return onnxruntime.InferenceSession(content, options, providers=[PROVIDER])
        except SESSION_ERRORS as error:
            raise CompressError(f"ONNX Runtime cannot open {file}: {first_line(error)}") from error

    def _run(self, session: Session, inputs: Tensor, output: str, file: str) -> Tensor:
        """One output over all inputs, in batches, as float32."""
        given = session.get_inputs()[0]
        # A file with a fixed batch gets exactly that many; the last batch is filled up and cut again.
        fixed = given.shape[0] if given.shape and isinstance(given.shape[0], int) else 0
        size = fixed or self.batch_size
        parts = []
        try:
            for start in range(0, max(len(inputs), 1), size):
                batch = self._raw(inputs[start : start + size].float())
                n = len(batch)
                if fixed:
                    batch = torch.cat([batch, batch.new_zeros(fixed - n, *batch.shape[1:])])
                values = batch.contiguous().numpy().astype(DTYPES[given.type])
                made = torch.from_numpy(session.run([output], {given.name: values})[0]).float()
                if fixed and made.shape[:1] == (fixed,):
                    made = made[:n]
                parts.append(made)
        except SESSION_ERRORS as error:
            raise CompressError(f"ONNX Runtime cannot run {file}: {first_line(error)}") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _raw(self, batch: Tensor) -> Tensor:
        """The batch as the file expects it."""
        if not self.mean:
            return batch
        shape = (-1, *(1 for _ in batch.shape[2:]))
        return (batch - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)
