"""A session of ONNX Runtime in a process of its own, with bounded memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from secure_export.errors import CompressError
from secure_export.runtimes import _worker
from secure_export.runtimes._checks import printable_line

GIGABYTE = 2**30
LARGEST_ANSWER = GIGABYTE
"""Bytes of one batch's output that are still read; logits and hidden layers are far below."""

NO_MEMORY = ("MemoryError", "bad_alloc", "bad allocation", "Failed to allocate memory")
"""How an error says that the bound on memory was met."""


class Value(NamedTuple):
    """What a session says of an input or an output; the names are those of onnxruntime.NodeArg."""

    name: str
    type: str = ""
    shape: tuple[Any, ...] = ()


class IsolatedSession:
    """As much of onnxruntime.InferenceSession as this package uses, run elsewhere."""

    def __init__(
        self,
        content: bytes,
        file: str,
        *,
        level: int,
        threads: int,
        config: Mapping[str, str],
        provider: str,
        gigabytes: float,
        seconds: float,
    ) -> None:
        """Open the model `content`; the child may grow by `gigabytes`, each call may take `seconds`.

        Raises:
            CompressError: ONNX Runtime cannot open it, or not within these bounds.
        """
        self.file, self.seconds, self.gigabytes = file, seconds, gigabytes
        # -P: nothing that lies in the working directory can stand in for a library.
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this package's own file
            [sys.executable, "-P", str(Path(_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, self._process)
        setup = {
            "level": level,
            "threads": threads,
            "config": dict(config),
            "providers": [provider],
            "memory": int(gigabytes * GIGABYTE),
            "bytes": len(content),
        }
        found, _ = self._ask(setup, content, "open")
        self._inputs = [Value(name, kind, tuple(shape)) for name, kind, shape in found["inputs"]]
        self._outputs = [Value(name) for name in found["outputs"]]

    def get_inputs(self) -> list[Value]:
        """Name, type and shape of every input."""
        return self._inputs

    def get_outputs(self) -> list[Value]:
        """Names of the outputs."""
        return self._outputs

    def run(self, outputs: list[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """One output for one input, as float32.

        Raises:
            CompressError: it fails, or not within the bounds of memory and time.
        """
        ((name, batch),) = feed.items()
        content = np.ascontiguousarray(batch, dtype=np.float32).tobytes()
        asked = {"input": name, "output": outputs[0], "dtype": str(batch.dtype), "shape": batch.shape}
        found, made = self._ask({**asked, "bytes": len(content)}, content, "run")
        return [np.frombuffer(made, np.float32).reshape(found["shape"]).copy()]

    def _ask(self, header: dict[str, Any], content: bytes, what: str) -> tuple[dict[str, Any], bytes]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            return self._exchange(header, content, what)
        except (OSError, ValueError) as error:
            self._process.kill()
            bound = f"{self.seconds:g} s" if late.is_set() else f"{self.gigabytes:g} GiB of memory"
            raise CompressError(
                f"ONNX Runtime cannot {what} {self.file}: it was stopped, for it needs more than {bound}",
                hint="a classifier of ordinary size needs far less; look at what the file does",
            ) from error
        finally:
            timer.cancel()

    def _exchange(self, header: dict[str, Any], content: bytes, what: str) -> tuple[dict[str, Any], bytes]:
        given, made = self._process.stdin, self._process.stdout
        if given is None or made is None:
            raise OSError("no pipe")
        given.write(json.dumps(header).encode() + b"\n" + content)
        given.flush()
        found = json.loads(made.readline(10_000_000))
        if "error" in found:
            if any(words in found["error"] for words in NO_MEMORY):
                raise OSError("no memory")
            raise CompressError(f"ONNX Runtime cannot {what} {self.file}: {printable_line(found['error'])}")
        if found["bytes"] > LARGEST_ANSWER:
            raise OSError("too large an answer")
        body = made.read(found["bytes"])
        if len(body) != found["bytes"]:
            raise OSError("cut short")
        return found, body


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
