"""Release: the measured bytes, all at once or not at all, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secure_export.errors import IntegrityError, ReleaseError
from secure_export.records.measured import Artifact
from secure_export.release import SUMS, release, withdraw
from tests.releasing import DOCUMENTS, OK, approved, fails, make_artifact, nothing_at


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Artifact]:
    return [make_artifact(tmp_path / "work", name, name.encode() * 999) for name in ("fp32", "prune@0.3")]


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "out" / "release"


def test_released_files_are_the_measured_bytes(artifacts: list[Artifact], destination: Path) -> None:
    released = release(OK, artifacts, DOCUMENTS, destination)
    assert [path.name for path in released] == [
        "fp32.onnx",
        "prune@0.3.onnx",
        "report.json",
        "report.md",
        SUMS,
    ]
    assert sorted(released) == sorted(destination.iterdir())
    for artifact, path in zip(artifacts, released, strict=False):
        assert path.read_bytes() == artifact.path.read_bytes()
    assert (destination / "report.json").read_bytes() == b"{}\n"
    assert list(destination.parent.iterdir()) == [destination]
    umask = os.umask(0)
    os.umask(umask)
    assert destination.stat().st_mode & 0o777 == 0o777 & ~umask


def test_sums_are_what_sha256sum_reads(artifacts: list[Artifact], destination: Path) -> None:
    release(OK, artifacts, DOCUMENTS, destination)
    listed = dict(reversed(line.split("  ")) for line in (destination / SUMS).read_text().splitlines())
    assert listed["fp32.onnx"] == artifacts[0].sha256
    assert set(listed) | {SUMS} == {path.name for path in destination.iterdir()}
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "--check", "--strict", SUMS], cwd=destination, check=True, capture_output=True)


@pytest.mark.parametrize("position", [0, -1])
def test_flipped_byte_is_refused(artifacts: list[Artifact], destination: Path, position: int) -> None:
    content = bytearray(artifacts[1].path.read_bytes())
    content[position] ^= 1
    artifacts[1].path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"expected {artifacts[1].sha256}"):
        release(OK, artifacts, DOCUMENTS, destination)
    assert nothing_at(destination)


def test_file_that_changes_while_it_is_copied_is_refused(
    artifacts: list[Artifact], destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfileobj

    def tampering(source: Any, target: Any, length: int = 0) -> None:
        target.write(b"x")
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", tampering)
    with pytest.raises(IntegrityError):
        release(OK, artifacts, DOCUMENTS, destination)
    assert nothing_at(destination)


def test_file_that_is_gone_is_refused(artifacts: list[Artifact], destination: Path) -> None:
    artifacts[0].path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read: No such file"):
        release(OK, artifacts, DOCUMENTS, destination)
    assert nothing_at(destination)


def test_same_release_again_is_left_alone(artifacts: list[Artifact], destination: Path) -> None:
    first = release(OK, artifacts, DOCUMENTS, destination)
    before = destination.stat().st_ino, (destination / SUMS).stat().st_mtime_ns
    assert release(OK, artifacts, DOCUMENTS, destination) == first
    assert (destination.stat().st_ino, (destination / SUMS).stat().st_mtime_ns) == before
    assert list(destination.parent.iterdir()) == [destination]


def released_with_other_documents(destination: Path, artifacts: list[Artifact]) -> None:
    release(OK, artifacts, {"report.json": b"other"}, destination)


def tampered_release(destination: Path, artifacts: list[Artifact]) -> None:
    release(OK, artifacts, DOCUMENTS, destination)
    (destination / "fp32.onnx").write_bytes(b"tampered")


def foreign_folder(destination: Path, artifacts: list[Artifact]) -> None:
    destination.mkdir(parents=True)
    (destination / "holiday.jpg").write_bytes(b"sea")


def plain_file(destination: Path, artifacts: list[Artifact]) -> None:
    destination.parent.mkdir(parents=True)
    destination.write_bytes(b"a file")


def dangling_link(destination: Path, artifacts: list[Artifact]) -> None:
    destination.parent.mkdir(parents=True)
    destination.symlink_to("nowhere")


@pytest.mark.parametrize(
    "occupy", [released_with_other_documents, tampered_release, foreign_folder, plain_file, dangling_link]
)
def test_what_is_at_the_destination_is_never_touched(
    occupy: Any, artifacts: list[Artifact], destination: Path
) -> None:
    def state() -> Any:
        if destination.is_dir():
            return sorted((p.name, p.read_bytes()) for p in destination.iterdir())
        found = destination.lstat()  # less the time of the last access: to look at a link counts as one
        return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    occupy(destination, artifacts)
    before = state()
    with pytest.raises(ReleaseError, match="exists and holds something else") as refused:
        release(OK, artifacts, DOCUMENTS, destination)
    assert "--out" in refused.value.hint
    assert state() == before
    assert list(destination.parent.iterdir()) == [destination]


def test_empty_folder_at_the_destination_is_filled(artifacts: list[Artifact], destination: Path) -> None:
    destination.mkdir(parents=True)
    withdraw(destination)
    release(OK, artifacts, DOCUMENTS, destination)
    assert (destination / SUMS).is_file()


# ---- Withdrawing ----------------------------------------------------------------------------------------


def test_earlier_release_is_withdrawn_and_replaced(artifacts: list[Artifact], destination: Path) -> None:
    withdraw(destination)
    release(OK, artifacts, DOCUMENTS, destination)
    withdraw(destination)
    assert nothing_at(destination)
    release(OK, artifacts[:1], {}, destination)
    assert sorted(path.name for path in destination.iterdir()) == [SUMS, "fp32.onnx"]


def test_tampered_release_can_be_withdrawn(artifacts: list[Artifact], destination: Path) -> None:
    tampered_release(destination, artifacts)
    withdraw(destination)
    assert nothing_at(destination)


def extra_file(destination: Path, artifacts: list[Artifact]) -> None:
    release(OK, artifacts, DOCUMENTS, destination)
    (destination / "notes.txt").write_text("mine")


@pytest.mark.parametrize("occupy", [foreign_folder, plain_file, dangling_link, extra_file])
def test_what_is_no_release_is_not_withdrawn(
    occupy: Any, artifacts: list[Artifact], destination: Path
) -> None:
    occupy(destination, artifacts)
    with pytest.raises(ReleaseError, match="is not a release of this tool"):
        withdraw(destination)
    assert os.path.lexists(destination)


def test_release_that_cannot_be_removed_is_an_error(
    artifacts: list[Artifact], destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(OK, artifacts, DOCUMENTS, destination)
    monkeypatch.setattr(Path, "rename", fails(errno.EACCES))
    with pytest.raises(ReleaseError, match="Permission denied"):
        withdraw(destination)
    assert (destination / SUMS).is_file()


# ---- Names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", ["../fp32", "/fp32", ".fp32", "a/b", "a\\b", "", "-rf", "a b", "ü", "a\n", "x" * 300]
)
def test_setting_cannot_name_a_path(setting: str, tmp_path: Path, destination: Path) -> None:
    artifact = replace(make_artifact(tmp_path / "work", "fp32"), setting=setting)
    with pytest.raises(ReleaseError, match="no safe file name"):
        release(approved(setting), [artifact], DOCUMENTS, destination)
    assert nothing_at(destination)


@pytest.mark.parametrize("name", ["../report.json", "a/b", ".hidden", ""])
def test_document_cannot_name_a_path(name: str, artifacts: list[Artifact], destination: Path) -> None:
    with pytest.raises(ReleaseError, match="no safe file name"):
        release(OK, artifacts, {name: b""}, destination)
    assert nothing_at(destination)


@pytest.mark.parametrize("name", ["FP32.onnx", "fp32.onnx", "sha256sums"])
def test_two_files_cannot_share_a_name(name: str, artifacts: list[Artifact], destination: Path) -> None:
    with pytest.raises(ReleaseError, match="have one name"):
        release(OK, artifacts, {name: b""}, destination)
    assert nothing_at(destination)


def test_only_what_was_judged_is_released(artifacts: list[Artifact], destination: Path) -> None:
    with pytest.raises(ReleaseError, match=r"says nothing of setting 'prune@0\.3'"):
        release(approved("fp32"), artifacts, DOCUMENTS, destination)
    with pytest.raises(ReleaseError, match="no file to release"):
        release(OK, [], DOCUMENTS, destination)
    assert nothing_at(destination)
