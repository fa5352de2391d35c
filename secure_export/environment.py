"""What the numbers were made with: library versions, the machine, and how long it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from secure_export import digests

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
    """Version of each library that can change a result, of Python, and of this package's own code."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "code": code()}
    for library in (*LIBRARIES, *EXTRAS):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            if library in LIBRARIES:
                found[library] = "absent"
    return found


def code(folder: Path = Path(__file__).parent) -> str:
    """Digest of a package's modules: between two releases the same version computes other things."""
    modules = sorted(folder.rglob("*.py"))
    return digests.of_json([[str(path.relative_to(folder)), digests.of_file(path)] for path in modules])[:16]


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
