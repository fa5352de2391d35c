"""The only writer of the destination: the measured bytes, all at once or not at all.

Everything is staged beside the destination, hashed again there, and becomes visible by one rename.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from secure_export import digests
from secure_export.errors import IntegrityError, ReleaseError
from secure_export.policy import Approved
from secure_export.records.measured import Artifact

SUMS = "SHA256SUMS"
"""Digest and name of every other file: `sha256sum -c` reads it, and it marks a folder as a release."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@=+-]{0,199}")
HINTS = {
    errno.ENOSPC: "the disk is full: make room and run the same command again",
    errno.EDQUOT: "the quota is used up: make room and run the same command again",
    errno.EROFS: "the destination is read-only: choose another with --out",
    errno.EACCES: "you may not write there: choose another destination with --out",
    errno.EPERM: "you may not write there: choose another destination with --out",
}


def release(
    approved: Approved, artifacts: Sequence[Artifact], documents: Mapping[str, bytes], destination: Path
) -> tuple[Path, ...]:
    """Put the measured files, `documents` and SHA256SUMS into the new folder `destination`; all its files.

    The same release that is there already is left alone; anything else that is there is never touched
    (withdraw() an earlier release first). A process that is killed leaves at most a hidden folder
    `.NAME.staging-*` beside the destination, which the next withdraw() removes.

    Raises:
        IntegrityError: a file is gone, or its bytes are not those that were measured.
        ReleaseError: the destination is taken or cannot be written, or a file has no safe or unique name.
    """
    names = _names(approved, artifacts, documents)
    staging = destination.with_name(f".{destination.name}.staging-{secrets.token_hex(4)}")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        for artifact, name in zip(artifacts, names, strict=False):
            _stage(artifact, staging / name)
        for name, content in documents.items():
            _write(staging / name, content)
        _write(staging / SUMS, _sums(staging, names).encode())
        _sync(staging)
        if not _same(staging, destination):
            _appear(staging, destination)
    except OSError as error:
        raise _unwritable(destination, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tuple(destination / name for name in (*names, SUMS))


def shipped_as(artifact: Artifact) -> str:
    """The name of a released file: its setting's, with the suffix that it was measured under."""
    return f"{artifact.setting}{artifact.path.suffix}"


def withdraw(destination: Path) -> None:
    """Remove an earlier release, at once, and what a killed process left half made; call it under locked().

    Raises:
        ReleaseError: what is there is no release (its files are not those of its SHA256SUMS), or it cannot be
            removed.
    """
    aside = destination.with_name(f".{destination.name}.withdrawn-{secrets.token_hex(4)}")
    try:
        _sweep(destination)
        if not _taken(destination):
            return
        if not _is_release(destination):
            raise ReleaseError(
                f"{destination} is not a release of this tool, so it is not removed",
                hint="choose another --out, or remove it yourself",
            )
        destination.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise _unwritable(destination, error) from error


def _sweep(destination: Path) -> None:
    """Remove the hidden folders of processes that were killed; their names are this module's own."""
    for name in ("staging", "withdrawn"):
        for left in destination.parent.glob(f".{destination.name}.{name}-????????"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)


def _unwritable(destination: Path, error: OSError) -> ReleaseError:
    message = f"{destination}: cannot be written: {error.strerror or error}"
    return ReleaseError(message, hint=HINTS.get(error.errno or 0, ""))


def _taken(destination: Path) -> bool:
    """Whether there is anything at the destination; a rename replaces an empty folder, so that is nothing."""
    if destination.is_dir() and not destination.is_symlink():
        return any(destination.iterdir())
    return os.path.lexists(destination)


def _names(approved: Approved, artifacts: Sequence[Artifact], documents: Mapping[str, bytes]) -> list[str]:
    """Names of all files but SHA256SUMS, artifacts first."""
    if not artifacts:
        raise ReleaseError("no file to release")
    for artifact in artifacts:
        if artifact.setting not in approved.settings:
            raise ReleaseError(f"the verdict says nothing of setting {artifact.setting!r}")
    names = [*map(shipped_as, artifacts), *documents]
    for name in names:
        if not NAME.fullmatch(name):
            raise ReleaseError(f"{name!r} is no safe file name", hint="letters, digits and ._@=+- only")
    # Folded, because on some file systems one of two such files would overwrite the other.
    if len({name.casefold() for name in [*names, SUMS]}) != len(names) + 1:
        raise ReleaseError(f"two files of the release have one name: {', '.join(sorted(names))}")
    return names


def _stage(artifact: Artifact, target: Path) -> None:
    """Copy a measured file; only the copy, which nobody else writes to, is hashed and shipped."""
    try:
        source = artifact.path.open("rb")
    except OSError as error:
        raise IntegrityError(
            f"{artifact.path}: the measured file cannot be read: {error.strerror}",
            hint="run the same command again",
        ) from error
    with source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    found = digests.of_file(target)
    if found != artifact.sha256:
        raise IntegrityError(
            f"{artifact.path}: got sha256 {found}, expected {artifact.sha256} as measured",
            hint="something changed the file after it was measured",
        )


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, not only the bytes of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sums(folder: Path, names: Sequence[str]) -> str:
    return "".join(f"{digests.of_file(folder / name)}  {name}\n" for name in sorted(names))


def _appear(staging: Path, destination: Path) -> None:
    if _taken(destination):
        raise ReleaseError(
            f"{destination} exists and holds something else",
            hint="choose another --out, or remove it yourself",
        )
    os.rename(staging, destination)
    try:
        _sync(destination.parent)
    except OSError:
        os.rename(destination, staging)  # an error must not leave a release behind
        raise


def _is_release(folder: Path) -> bool:
    """Whether the folder holds exactly the files that its SHA256SUMS names; their bytes may have changed."""
    sums = folder / SUMS
    if folder.is_symlink() or not sums.is_file():
        return False
    listed = [
        line.partition("  ")[2] for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return sorted([*listed, SUMS]) == sorted(path.name for path in folder.iterdir())


def _same(staging: Path, destination: Path) -> bool:
    """Whether the destination is this very release already, byte for byte."""
    if not destination.is_dir() or not _is_release(destination):
        return False
    sums = (staging / SUMS).read_bytes()
    names = [path.name for path in staging.iterdir() if path.name != SUMS]
    return (destination / SUMS).read_bytes() == sums == _sums(destination, names).encode()
