"""Files of optional toolchains: what is said where one is missing, and who reads a compiled file's head."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from secure_export import defence, registry
from secure_export.errors import PolicyError
from secure_export.formats import Format
from secure_export.policy import Setting, check_plugins, load_policy
from secure_export.records.measured import Artifact, SettingResult
from tests.conftest import toy_policy

INT8 = ({"kind": "executorch-int8"},)


def result(name: str, form: str, runtime: str) -> SettingResult:
    return SettingResult("original", name, Artifact(name, Path(name), "00", 1, form, runtime), None)


def test_compiled_file_is_read_through_the_same_steps_in_another_format() -> None:
    compiled, twin = result("pte", "executorch", "executorch"), result("pt2", "pt2", "torch-eager")
    other = result("other", "pt2", "torch-eager")
    originals = [compiled, other, twin]
    settings = [
        Setting("pte", INT8, {"kind": "executorch"}, True),
        Setting("other", (), {"kind": "pt2"}, False),
        Setting("pt2", INT8, {"kind": "pt2"}, False),
    ]
    assert compiled.artifact
    assert twin.artifact
    assert defence._readable("pte", compiled.artifact, originals, settings) is twin.artifact
    assert defence._readable("pt2", twin.artifact, originals, settings) is twin.artifact
    assert defence._readable("pte", compiled.artifact, originals, settings[:2]) is compiled.artifact
    assert defence._readable("pte", compiled.artifact, originals, ()) is compiled.artifact


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PolicyError, match="openvino: openvino is not installed") as caught:
        registry.build(Format, "formats", {"kind": "openvino"})
    assert caught.value.hint == 'pip install ".[openvino]" in the clone of secure-export'
    settings = [{"name": "ov", "steps": [], "format": {"kind": "openvino"}}]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(toy_policy(settings=settings, release=["ov"])))
    with pytest.raises(PolicyError, match=r"\.\[openvino\]"):
        check_plugins(load_policy(path))


def test_a_step_on_files_of_another_format_is_refused(tmp_path: Path) -> None:
    settings = [{"name": "wrong", "steps": [{"kind": "ort-static-int8"}], "format": {"kind": "pt2"}}]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(toy_policy(settings=settings, release=["wrong"])))
    with pytest.raises(PolicyError, match="ort-static-int8 works on onnx, the format is pt2"):
        check_plugins(load_policy(path))
