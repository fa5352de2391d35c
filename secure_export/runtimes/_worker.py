"""ONNX Runtime in a process of its own, for files of unknown origin: the program that runs there.

It imports nothing of this package and is started by its path. On stdin a JSON line and the model's bytes,
then a JSON line and float32 bytes per batch; on stdout a JSON line and the output's bytes each time.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO


def address_space() -> int:
    """Bytes that this process has mapped; 0 where the system does not say."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize()


def limit_memory(extra: int) -> None:
    """Let this process grow by `extra` bytes of address space and no further."""
    limit = address_space() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer(stream: BinaryIO, header: dict[str, Any], content: bytes = b"") -> None:
    """One JSON line, then `content`."""
    stream.write(json.dumps({**header, "bytes": len(content)}).encode() + b"\n" + content)
    stream.flush()


def serve(given: BinaryIO, made: BinaryIO) -> None:
    """Open the model, then answer batches until stdin ends."""
    import numpy as np
    import onnxruntime

    setup = json.loads(given.readline())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = setup["threads"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(setup["level"])
    for name, value in setup["config"].items():
        options.add_session_config_entry(name, value)
    limit_memory(setup["memory"])
    try:
        session = onnxruntime.InferenceSession(
            given.read(setup["bytes"]), options, providers=setup["providers"]
        )
    except Exception as error:  # noqa: BLE001 - whatever it raises goes to the parent as one line
        answer(made, {"error": f"{type(error).__name__}: {error}"})
        return
    inputs = [[value.name, value.type, value.shape] for value in session.get_inputs()]
    answer(made, {"inputs": inputs, "outputs": [value.name for value in session.get_outputs()]})
    while line := given.readline():
        asked = json.loads(line)
        batch = np.frombuffer(given.read(asked["bytes"]), np.float32).reshape(asked["shape"])
        try:
            feed = {asked["input"]: batch.astype(asked["dtype"])}
            output = np.ascontiguousarray(session.run([asked["output"]], feed)[0], dtype=np.float32)
            answer(made, {"shape": output.shape}, output.tobytes())
        except Exception as error:  # noqa: BLE001 - as above
            answer(made, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
