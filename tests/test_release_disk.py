"""A release that fails half-way, by a disk, an interrupt or a kill, leaves nothing at the destination."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secure_export import release as module
from secure_export.errors import NoVerdict, ReleaseError
from secure_export.records.measured import Artifact
from secure_export.release import release
from tests.releasing import DOCUMENTS, OK, fails, make_artifact, nothing_at


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Artifact]:
    return [make_artifact(tmp_path / "work", name, name.encode() * 999) for name in ("fp32", "prune@0.3")]


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "out" / "release"


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EROFS, "read-only"), (errno.EIO, "")],
)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_disk_error_leaves_nothing(
    call: str,
    code: int,
    hint: str,
    artifacts: list[Artifact],
    destination: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination.parent.mkdir(parents=True)
    monkeypatch.setattr(os, call, fails(code))
    with pytest.raises(ReleaseError, match=os.strerror(code)) as refused:
        release(OK, artifacts, DOCUMENTS, destination)
    assert hint in refused.value.hint
    assert isinstance(refused.value, NoVerdict)
    monkeypatch.undo()
    assert nothing_at(destination)


def test_error_after_the_rename_takes_the_release_back(
    artifacts: list[Artifact], destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = module._sync
    monkeypatch.setattr(
        module, "_sync", lambda path: fails(errno.EIO)() if path == destination.parent else sync(path)
    )
    with pytest.raises(ReleaseError):
        release(OK, artifacts, DOCUMENTS, destination)
    assert nothing_at(destination)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount, umount = shutil.which("mount"), shutil.which("umount")
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if (
        mount is None
        or umount is None
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("a tmpfs can only be mounted by root")
    yield folder
    subprocess.run([str(umount), str(folder)], check=True)


def test_disk_that_is_really_full_leaves_nothing(tmp_path: Path, tiny_disk: Path) -> None:
    large = make_artifact(tmp_path / "work", "fp32", os.urandom(100_000))
    with pytest.raises(ReleaseError, match="No space left on device"):
        release(OK, [large], DOCUMENTS, tiny_disk / "release")
    assert list(tiny_disk.iterdir()) == []


def test_destination_below_a_file_is_an_error(artifacts: list[Artifact], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReleaseError, match="cannot be written"):
        release(OK, artifacts, DOCUMENTS, tmp_path / "file" / "release")


@pytest.mark.parametrize("function", ["_stage", "_write", "_sync", "_appear"])
def test_interrupt_leaves_nothing(
    function: str, artifacts: list[Artifact], destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        release(OK, artifacts, DOCUMENTS, destination)
    assert nothing_at(destination)


KILLED = """
import os, signal, sys
from pathlib import Path
from secure_export import release as module
from tests.releasing import DOCUMENTS, OK, make_artifact
folder = Path(sys.argv[1])
setattr(module, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
module.release(OK, [make_artifact(folder / "work", "fp32")], DOCUMENTS, folder / "out" / "release")
"""


@pytest.mark.parametrize("function", ["_write", "_appear"])
def test_kill_in_the_middle_leaves_no_destination(function: str, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), function], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    (staging,) = (tmp_path / "out").iterdir()
    assert staging.name.startswith(".release.staging-")
    artifact = make_artifact(tmp_path / "work", "fp32")
    assert len(release(OK, [artifact], DOCUMENTS, tmp_path / "out" / "release")) == 4
