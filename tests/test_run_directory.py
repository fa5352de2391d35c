"""One run at a time in a run directory, and nothing left of those that were killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from secure_export.compressors import _ort
from secure_export.errors import ReleaseError
from secure_export.release import withdraw
from secure_export.report.documents import save
from secure_export.run_directory import LEFT, claimed, locked, sweep, unlinked
from tests.gating import Gate, exported, refused
from tests.judging import make_report


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


@pytest.mark.parametrize(
    "name",
    [".lock", "report.json", "report.md.partial", "work/0123456789abcdef.onnx", "ledger/suspect-0.entry"],
)
def test_a_link_in_a_prepared_run_directory_is_not_followed(name: str, tmp_path: Path) -> None:
    gate, victim = Gate(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    (gate.out / name).parent.mkdir(parents=True)
    (gate.out / ".lock").touch()
    (gate.out / name).unlink(missing_ok=True)
    (gate.out / name).symlink_to(victim)
    refused(gate, gate.run(), "is a link", name)
    assert victim.read_text() == "precious"
    (gate.out / name).unlink()


def test_a_folder_of_a_run_directory_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    gate, elsewhere = Gate(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    gate.out.mkdir()
    (gate.out / ".lock").touch()
    (gate.out / "work").symlink_to(elsewhere)
    refused(gate, gate.run(), "is a link", "work")
    assert list(elsewhere.iterdir()) == []


def test_a_pipe_in_a_run_directory_keeps_nobody_waiting(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    (gate.out / "ledger").mkdir(parents=True)
    (gate.out / ".lock").touch()
    os.mkfifo(gate.out / "ledger" / "suspect-0.entry")
    refused(gate, gate.run(), "is no file", "suspect-0.entry")


def test_links_of_killed_steps_and_a_run_directory_behind_a_link_are_no_obstacle(tmp_path: Path) -> None:
    killed = tmp_path / "disk" / "work" / ".0123456789abcdef.onnx.a1b2c3d4"
    killed.mkdir(parents=True)
    (killed / "libtoolchain").symlink_to("/usr/lib")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    unlinked(tmp_path / "run")


def test_a_report_replaces_what_lies_in_its_place(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.json", "report.json.partial"):
        (tmp_path / name).hardlink_to(victim)
    save(make_report(), tmp_path)
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "report.json").read_text())
    assert not (tmp_path / "report.json.partial").exists()


def test_the_lock_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").hardlink_to(tmp_path / "victim")
    with locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


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
