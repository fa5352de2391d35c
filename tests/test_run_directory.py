"""One run at a time in a run directory, and nothing left of those that were killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from secure_export.compressors import _ort
from secure_export.errors import ReleaseError
from secure_export.release import withdraw
from secure_export.run_directory import LEFT, claimed, locked, sweep
from tests.gating import exported


def test_a_second_run_in_the_same_directory_is_told(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(ReleaseError, match="another run is at work"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    ours = [tmp_path / ".release.staging-0a1b2c3d", tmp_path / ".release.withdrawn-ffffffff"]
    others = [tmp_path / ".other.staging-0a1b2c3d", tmp_path / ".release.staging-mine", tmp_path / "staging"]
    for folder in (*ours, *others):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"weights")
    withdraw(tmp_path / "release")
    assert not any(folder.exists() for folder in ours)
    assert all(folder.exists() for folder in others)


def test_a_folder_that_holds_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ReleaseError, match="no run directory"):
        claimed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert claimed(tmp_path / "new") == tmp_path / "new"
    with locked(tmp_path / "new"):
        pass
    (tmp_path / "new" / "report.json").write_text("{}")
    assert claimed(tmp_path / "new") == tmp_path / "new"


def test_only_folders_of_killed_steps_are_swept(tmp_path: Path) -> None:
    ours = tmp_path / ".0123456789abcdef.onnx.a1b2c3d4"
    others = [tmp_path / ".git", tmp_path / ".cache", tmp_path / ".0123.onnx.a1b2c3d4"]
    for folder in (ours, *others):
        folder.mkdir()
        (folder / "config").write_text("precious")
    (tmp_path / ".fedcba9876543210.onnx.a1b2c3d4").symlink_to(tmp_path / ".git")
    sweep(tmp_path)
    assert not ours.exists()
    assert all((folder / "config").is_file() for folder in others)


def test_a_step_on_a_file_works_in_a_folder_that_is_swept_if_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "source.onnx").write_bytes(exported("clean"))
    seen: list[str] = []

    def interrupted(prepared: Path, written: Path) -> None:
        seen.append(prepared.parent.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _ort.quantized("int8", tmp_path / "source.onnx", tmp_path / "0123456789abcdef.onnx", interrupted)
    (name,) = seen
    assert LEFT.fullmatch(name)
