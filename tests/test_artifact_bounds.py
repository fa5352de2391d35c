"""Memory, names and the disk, whatever somebody hands in as an artifact: one clear line, nothing released."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from secure_export import incoming, lane, pipeline
from secure_export.cli import main
from secure_export.errors import CompressError
from secure_export.twins import Twin
from tests.gating import FLOAT, Gate, array, exported, refused


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.mark.parametrize("size", [0, 1_000_000_000])
def test_fixed_batch_that_nobody_can_fill(gate: Gate, size: int) -> None:
    proto = gate.graph()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    gate.save(proto)
    refused(gate, gate.run(), f"takes {size} samples at a time")


def test_input_without_a_shape_is_no_verdict(gate: Gate) -> None:
    """ONNX Runtime runs it; the locator cannot look at its head, and that is said."""
    proto = gate.graph()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    gate.save(proto)
    result = gate.run()
    assert result.exit_code == 4, result.output
    assert "does not say the size of its inputs" in result.output
    assert not (gate.out / "release").exists()


def broadcast(proto: onnx.ModelProto, side: int) -> onnx.ModelProto:
    """Logits as before, plus nothing times the mean of a shape.

    ONNX Runtime never makes the sum of that shape: `side` squared values from two times `side`.
    """
    proto.graph.node[-1].output[0] = "honest"
    ones = np.ones((side, 1), np.float32)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(ones, "a"), numpy_helper.from_array(ones.T.copy(), "b")]
    )
    proto.graph.initializer.append(array("zero", 0, np.float32))
    proto.graph.node.extend(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Shape", ["sum"], ["shape"]),
            helper.make_node("Cast", ["shape"], ["sides"], to=FLOAT),
            helper.make_node("ReduceMean", ["sides"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
            helper.make_node("Add", ["honest", "nothing"], ["logits"]),
        ]
    )
    return proto


def test_twin_of_small_tensors_that_take_40_gigabytes(gate: Gate) -> None:
    proto = broadcast(gate.graph(), 100_000)
    with (
        incoming.bounded(),
        pytest.raises(CompressError, match=r"Add: .*allocate memory"),
    ):
        Twin(proto, "theirs.onnx")


def test_memory_beyond_the_bound_is_one_line_and_the_bound_goes_again() -> None:
    with pytest.raises(CompressError, match="more than 16 GiB"), incoming.bounded():
        torch.ones(6 * 2**30)
    with pytest.raises(RuntimeError, match="other"), incoming.bounded():
        raise RuntimeError("other")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("values", [np.array(["x", "y"], object), None])
def test_weights_that_torch_does_not_know_have_no_twin(gate: Gate, values: Any) -> None:
    """Strings and bfloat16: ONNX Runtime drops what nothing reads."""
    proto = gate.graph()
    tensor = helper.make_tensor("odd", TensorProto.BFLOAT16, [2], [1.0, 2.0])
    proto.graph.initializer.append(tensor if values is None else numpy_helper.from_array(values, "odd"))
    with pytest.raises(CompressError, match="'odd' cannot be read"):
        Twin(proto, "theirs.onnx")
    gate.save(proto)
    assert gate.run().exit_code == 0


@pytest.mark.parametrize("name", ["a\nerror: b\x1b[31m.onnx", "-x.onnx", "\u202egnp.onnx"])
def test_hostile_file_name_cannot_steer_a_terminal(gate: Gate, name: str) -> None:
    content = gate.file.read_bytes()
    gate.file = gate.file.with_name(name)
    gate.file.write_bytes(content[:500])
    result = gate.run()
    refused(gate, result, "cut short")
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output
    gate.file.write_bytes(content)
    assert gate.run().exit_code == 0
    assert sorted(path.name for path in (gate.out / "release").iterdir())[1] == "artifact.onnx"
    for report in ("report.json", "report.md", "report.html"):
        text = (gate.out / report).read_text()
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_file_name_that_is_no_utf8(gate: Gate) -> None:
    gate.file = gate.file.with_name(os.fsdecode(b"\xff.onnx"))
    gate.file.write_bytes(exported("clean"))
    refused(gate, gate.run(), "no UTF-8", code=2)


def test_default_run_directory_is_named_by_safe_letters(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gate.file = gate.file.rename(gate.file.with_name("a\n b.onnx"))
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(gate.policy))
    result = CliRunner().invoke(main, ["run", "-p", "gate.yaml", "--artifact", str(gate.file), "-q"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gate-a__b"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_folder_or_pipe(gate: Gate, make: Any) -> None:
    gate.file.unlink()
    make(gate.file)
    refused(gate, gate.run(), "theirs.onnx is no plain file")


def test_full_disk(gate: Gate) -> None:
    """No file may grow beyond 2,000 bytes, so that the copy of the artifact does not fit."""
    (gate.out.parent / "gate.yaml").write_text(yaml.safe_dump(gate.policy))
    small_disk = (
        "import resource, sys\nfrom secure_export.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", small_disk, "run", "--policy", str(gate.out.parent / "gate.yaml")]
    command += ["--artifact", str(gate.file), "--out", str(gate.out), "-q"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ")
    assert "File too large" in done.stderr
    assert not (gate.out / "release").exists()
    assert gate.run().exit_code == 0


@pytest.mark.parametrize(
    ("module", "stage"), [(incoming, "count_classes"), (lane, "measure"), (pipeline, "judge")]
)
def test_killed_and_run_again(gate: Gate, module: Any, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill -9 leaves it: whatever lies in the run directory then, the same command goes on."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, killed)
        with pytest.raises(Killed):
            gate.run()
    (gate.out / "ledger" / "measurement-0.partial").write_bytes(b"{")
    (gate.out / "work" / ".0123456789abcdef.onnx.ab12cd34").mkdir()
    assert not (gate.out / "release").exists()
    assert gate.run().exit_code == 0
    assert [path.name for path in (gate.out / "work").iterdir() if path.name.startswith(".")] == []
