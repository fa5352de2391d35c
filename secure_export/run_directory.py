"""The run directory: whose it is, that one run at a time writes to it, and what others left there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError

from secure_export.errors import PolicyError, ReleaseError

if TYPE_CHECKING:
    from secure_export.policy import Policy

LOCK = ".lock"
"""Marks a run directory, whoever holds it."""
LEFT = re.compile(r"\.[0-9a-f]{16}\.\w+\.\w{8}")
"""Temporary folder of a step on a file."""


def apart(policy: Policy, run_dir: Path) -> None:
    """The run directory must not lie in the data, where the next run would take it for a class.

    Raises:
        PolicyError: it does.
    """
    for source in filter(None, (policy.data.path, policy.data.holdout_path)):
        folder = Path(source).resolve()
        if folder.is_dir() and run_dir.resolve().is_relative_to(folder):
            raise PolicyError(f"{run_dir} lies in the data ({source})", hint="choose another --out")


def claimed(folder: Path) -> Path:
    """The folder, if it is a run directory already or holds nothing: a run writes and removes files in it.

    Raises:
        ReleaseError: it holds something else.
    """
    if folder.is_dir() and not (folder / LOCK).is_file() and any(folder.iterdir()):
        raise ReleaseError(
            f"{folder} is no run directory of this tool and not empty, so nothing is written there",
            hint="choose a new folder with --out",
        )
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run directory for this process alone; the system frees it when the process ends, however it ends.

    Raises:
        ReleaseError: another process holds it, or its lock is a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ReleaseError(
                f"{folder}: another run is at work in this run directory",
                hint="wait for it, or choose another --out",
            ) from error
        yield


def _opened(lock: Path) -> BinaryIO:
    """The lock's file, neither emptied nor reached through a link."""
    try:
        return open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _foreign(lock, "a link") from error


def unlinked(folder: Path) -> None:
    """Every file below the run directory must lie there: a run would write to whatever a link leads to.

    Raises:
        ReleaseError: a link or a device.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _foreign(Path(entry.path), "a link")
            if entry.is_dir() and not LEFT.fullmatch(entry.name):
                unlinked(Path(entry.path))
            elif not entry.is_dir() and not entry.is_file():
                raise _foreign(Path(entry.path), "no file")


def _foreign(path: Path, what: str) -> ReleaseError:
    return ReleaseError(
        f"{path} is {what}, expected a file that a run made", hint="remove it, or choose another --out"
    )


def sweep(folder: Path) -> None:
    """Remove the temporary folders of steps that were killed, and nothing else that is hidden there."""
    for left in folder.iterdir():
        if LEFT.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)


@contextmanager
def writing_to(run_dir: Path) -> Iterator[None]:
    """A disk that is full or read-only is one clear line, wherever it shows."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReleaseError(
            f"{getattr(error, 'filename', None) or run_dir}: cannot be written: {reason}",
            hint="make room or choose another --out; the same command resumes",
        ) from error
