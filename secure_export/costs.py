"""What a file costs: parameters, multiplications, and latency and memory in a process that does nothing else.

Latency and memory belong to this machine: they stand in the report, never in what a digest is taken of.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secure_export.errors import CompressError, SecureExportError
from secure_export.records.measured import Artifact, Cost
from secure_export.records.memory import Predictor
from secure_export.runtimes import Options, _worker
from secure_export.runtimes import runtime as runtime_of
from secure_export.runtimes._isolated import GIGABYTE
from secure_export.runtimes.onnxruntime import Onnxruntime

BATCHES = (1, 64)
SECONDS = 2.0
"""Spent on each batch size at least once warm, and on no more than MOST runs."""
MOST, WARM = 100, 3
PATIENCE = 300.0
"""Seconds after which a file is given up."""


def weights_and_macs(model: nn.Module, example: Tensor) -> tuple[int, int] | None:
    """(parameters, multiply-accumulates per sample) of `model` on `example` [1, ...].

    Multiplications are those of Conv2d and Linear layers, as papers count them; None where there are none, as
    in a graph that a quantizer has rewritten.
    """
    macs = [0]

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        weight = layer.get_parameter("weight")
        macs[0] += output.numel() * math.prod(weight.shape[1:])

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (parameters, macs[0] // len(example)) if macs[0] else None


def measured(artifact: Artifact, shape: tuple[int, ...], options: Options) -> Cost:
    """Cost of `artifact` for inputs of `shape`, one thread; what cannot be measured is None, and says why."""
    asked = {"kind": artifact.runtime, "options": dict(options), "path": str(artifact.path), "shape": shape}
    try:
        found, why = _child(asked), ""
    except CompressError as error:
        found, why = {}, error.message
    return Cost(
        setting=artifact.setting,
        format=artifact.format,
        size=artifact.size,
        parameters=artifact.parameters,
        macs=artifact.macs,
        batch_1_ms=found.get("1"),
        batch_64_ms=found.get("64"),
        peak_bytes=found.get("peak"),
        threads=1,
        why=why,
    )


def _child(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `main` prints, run apart.

    Raises:
        CompressError: it fails there, or takes too long.
    """
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # -P: nothing that lies in the working directory can stand in for a library.
    command = [sys.executable, "-P", "-c", "from secure_export.costs import main; main()", json.dumps(asked)]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, this package
            command, env=environment, capture_output=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompressError(f"not measured within {PATIENCE:g} s") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise CompressError(f"not measured: {reason[-1] if reason else f'exit {done.returncode}'}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    """The program of the child: one JSON argument in, one JSON line out."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # One core, because not every runtime can be told how many threads to use.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        runtime = runtime_of(asked["kind"], asked["options"])
        bound = 0
        if isinstance(runtime, Onnxruntime) and runtime.isolated:
            # This process is apart already; another one behind it would hide what the file takes.
            bound = int(runtime.gigabytes * GIGABYTE)
            runtime = runtime.model_copy(update={"isolated": False})
        inputs = torch.rand((max(BATCHES), *asked["shape"]), generator=torch.Generator().manual_seed(0))
        before = _reset_peak()
        if bound:
            _worker.limit_memory(bound)
        predict = runtime.open(Path(asked["path"]))
        found: dict[str, float | None] = {str(n): latency(predict, inputs[:n]) for n in BATCHES}
        peak = _status("VmHWM")
    except SecureExportError as error:
        raise SystemExit(error.message) from error
    found["peak"] = peak - before if peak and before else None
    sys.stdout.write(json.dumps(found) + "\n")


def latency(predict: Predictor, inputs: Tensor) -> float:
    """Median milliseconds of a call, warm."""
    for _ in range(WARM):
        predict(inputs)
    taken: list[float] = []
    began = time.perf_counter()
    while not taken or (len(taken) < MOST and time.perf_counter() - began < SECONDS):
        started = time.perf_counter()
        predict(inputs)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def _reset_peak() -> int:
    """Forget the peak that importing reached; bytes resident now, 0 where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
