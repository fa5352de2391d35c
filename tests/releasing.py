"""Approved verdicts and measured files, for tests of the release."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from secure_export.policy import Approved, approve
from secure_export.records.measured import Artifact, Finding, Verdict

DOCUMENTS = {"report.json": b"{}\n", "report.md": b"# Released\n"}


def approved(*settings: str) -> Approved:
    findings = tuple(Finding("asr", setting, 0.0, 0.01, 0.05, 300, True, "holds") for setting in settings)
    return approve(Verdict("released", findings))


def make_artifact(folder: Path, setting: str, content: bytes = b"weights" * 1000) -> Artifact:
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(setting.encode()).hexdigest()[:8]}.onnx"
    path.write_bytes(content)
    return Artifact(setting, path, hashlib.sha256(content).hexdigest(), len(content), "onnx", "onnxruntime")


OK = approved("fp32", "prune@0.3", "int8")


def nothing_at(destination: Path) -> bool:
    """No release, and no staging folder either."""
    return not destination.parent.exists() or list(destination.parent.iterdir()) == []


def fails(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail
