"""A gate for files of other tools, and hostile files to hold against it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from secure_export.cli import main
from secure_export.formats.onnx import Onnx
from tests import toys
from tests.conftest import toy_policy

RULES = [
    {"metric": "acc", "at_least": 0.9, "settings": "released"},
    {"metric": "lift", "at_most": 0.02, "settings": "all"},
]
FLOAT = TensorProto.FLOAT


@functools.cache
def exported(name: str) -> bytes:
    """A toy as the file that another tool would make of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        Onnx().write(getattr(toys, name)(), torch.rand(2, 1, 8, 8), path)
        return path.read_bytes()


class Gate:
    """A file that would be released, in a folder; each test spoils it and calls run()."""

    def __init__(self, folder: Path) -> None:
        self.file, self.out = folder / "theirs.onnx", folder / "run"
        self.policy = toy_policy(rules=RULES, subject={})
        self.file.write_bytes(exported("clean"))

    def run(self, *flags: str) -> Result:
        path = self.file.with_name("gate.yaml")
        path.write_text(yaml.safe_dump(self.policy))
        command = ["run", "--policy", str(path), "--artifact", str(self.file), "--out", str(self.out), "-q"]
        return CliRunner().invoke(main, [*command, *flags])

    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.file)

    def save(self, proto: onnx.ModelProto) -> None:
        self.file.write_bytes(proto.SerializeToString())


def refused(gate: Gate, result: Result, *words: str, code: int = 4) -> None:
    """One clear line, the exit code, no traceback, nothing released."""
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert len(errors) == 1, result.output
    assert len(errors[0]) < 400
    for word in words:
        assert word in result.output
    assert not (gate.out / "release").exists()


def small(nodes: list[onnx.NodeProto], sizes: list[Any], weights: Any = (), **more: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "crafted", [value("input", FLOAT, sizes)], [value("logits", FLOAT, ["n", 4])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, **more)


def array(name: str, values: Any, dtype: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)
