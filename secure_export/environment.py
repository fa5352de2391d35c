"""What the numbers were made with: library versions, the machine, and how long it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

LIBRARIES = (
    "secure-export",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch",
    "torch-pruning",
    "torchao",
)
EXTRAS = (
    "torchvision",
    "timm",
    "executorch",
    "openvino",
    "nncf",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
)
"""Named where they are installed: without them nothing is made that they could change."""


def versions() -> Mapping[str, str]:
    """Version of each library that can change a result, and of Python."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for library in (*LIBRARIES, *EXTRAS):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            if library in LIBRARIES:
                found[library] = "absent"
    return found


class Clock:
    """Seconds per stage, of this call (what came from the ledger costs nothing)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self.seconds[stage] = round(spent, 3)
