"""What a run has already done, on disk: the same command on the same run directory does what is missing.

An entry is named by the full digest of everything that determines its result, so a changed model, policy,
library or seed finds no entry and is done anew. Failures are never entered. An entry counts only where its
seal shows that this user's own runs made it: anybody may have written to a run directory.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from secure_export import digests
from secure_export.records.memory import Progress
from secure_export.whole import write
from secure_export.words import described

T = TypeVar("T")

KEY_BYTES = 32


class Ledger:
    """Sealed JSON records in a folder, one file an entry.

    `environment` (library versions) is part of every name; `key` is what entries are sealed with (user_key).
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], key: bytes) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._key = key
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, record: type[T], *determined_by: Any) -> T | None:
        """The stored record; None where there is none, it cannot be read, or another key sealed it."""
        path = self._path(record, determined_by)
        try:
            seal, _, content = path.read_bytes().partition(b"\n")
            if not hmac.compare_digest(seal, self._seal(path.name, content)):
                return None
            return TypeAdapter(record).validate_json(content)
        except (OSError, ValidationError):
            return None

    def enter(self, value: T, *determined_by: Any) -> T:
        """Store `value` (whole or not at all) and return it."""
        path = self._path(type(value), determined_by)
        content = TypeAdapter(type(value)).dump_json(value, indent=1)
        write(path, self._seal(path.name, content) + b"\n" + content)
        return value

    def _path(self, record: type, determined_by: tuple[Any, ...]) -> Path:
        key = digests.of_json([record.__name__, self._environment, determined_by])
        return self._folder / f"{record.__name__.lower()}-{key}.entry"

    def _seal(self, name: str, content: bytes) -> bytes:
        """HMAC-SHA256 of the name, too: an entry under another's name is none."""
        return hmac.new(self._key, f"{name}\n".encode() + content, hashlib.sha256).hexdigest().encode()


def user_key(progress: Progress) -> bytes:
    """This user's key, made at the first call and kept outside every run directory.

    Where it cannot be kept, a key of this process alone: what it seals is done again by the next.
    """
    try:
        path = key_file(os.environ)
        if not path.exists():
            _make(path)
        return _read(path)
    except (OSError, RuntimeError) as error:
        notice = f"results of this run cannot be reused by the next: no key of yours ({described(error)})"
        progress(notice, 0, 1)
        progress(notice, 1, 1)
        return secrets.token_bytes(KEY_BYTES)


def key_file(environment: Mapping[str, str]) -> Path:
    """Where the key lies, by the XDG base directories; a relative one does not count.

    Raises:
        RuntimeError: the user has no home directory.
    """
    named = Path(environment.get("XDG_STATE_HOME", ""))
    state = named if named.is_absolute() else Path.home() / ".local" / "state"
    return state / "secure-export" / "ledger.key"


def _make(path: Path) -> None:
    """A new key, whole or not at all; of two processes the first makes it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        os.link(partial, path)
    except FileExistsError:
        return
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """The key.

    Raises:
        OSError: it cannot be read, or somebody else could have: not a file of this user alone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        key = file.read(KEY_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is open to others, expected mode 600 and you as owner")
    if len(key) != KEY_BYTES:
        raise OSError(f"{path} is no key of {KEY_BYTES} bytes: remove it")
    return key
