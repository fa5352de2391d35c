"""A folder that somebody else filled: its names, and its plain files by their bytes. No link is followed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from secure_export.errors import IntegrityError, NoVerdict

if TYPE_CHECKING:
    from io import BufferedReader


@dataclass(frozen=True)
class Held:
    """A file by the bytes that were read of it."""

    name: str
    size: int
    sha256: str


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The folder itself: where its name leads to later changes nothing of what is read.

    Raises:
        IntegrityError: a file that is asked for inside is not there. NoVerdict: something cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise NoVerdict(f"{folder}: cannot be read: {error.strerror}") from error
    try:
        yield descriptor
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{folder}: no {error.filename} in it", hint="expected a folder release/, with every file of it"
        ) from error
    except OSError as error:
        raise NoVerdict(f"{folder}: {error.filename} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def names(descriptor: int, at_most: int) -> set[str]:
    """Names in the folder, but no more than it takes to see that there are too many."""
    with os.scandir(descriptor) as entries:
        return {entry.name for entry in islice(entries, at_most)}


def held(descriptor: int, name: str) -> Held:
    """A file of the folder.

    Raises:
        IntegrityError: it is a link, or no plain file.
    """
    with _plain(descriptor, name) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Held(name, file.tell(), digest)


def content(descriptor: int, name: str, at_most: int) -> tuple[Held, bytes]:
    """As held(), with the content that the digest is of.

    Raises:
        IntegrityError: as held(), or it is larger than `at_most`.
    """
    with _plain(descriptor, name) as file:
        found = file.read(at_most + 1)
    if len(found) > at_most:
        raise IntegrityError(f"{name}: got more than {at_most} bytes, which is more than it can need")
    return Held(name, len(found), hashlib.sha256(found).hexdigest()), found


@contextmanager
def _plain(descriptor: int, name: str) -> Iterator[BufferedReader]:
    try:
        # Without O_NONBLOCK a pipe would be waited for.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        what = "a link" if error.errno == errno.ELOOP else "a socket or a device"
        raise IntegrityError(f"{name} is {what}, expected a plain file") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise IntegrityError(f"{name} is a folder, a pipe or a device, expected a plain file")
    with os.fdopen(file, "rb") as reader:
        yield reader
