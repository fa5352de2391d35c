"""One run at a time in a run directory, and nothing left of those that were killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from secure_export.errors import ReleaseError
from secure_export.release import locked, withdraw


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
