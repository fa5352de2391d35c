"""What a run has already done, on disk: the same command on the same run directory does what is missing.

An entry is named by the full digest of everything that determines its result, so a changed model, policy,
library or seed finds no entry and is done anew. Failures are never entered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from secure_export import digests

T = TypeVar("T")


class Ledger:
    """JSON records in a folder, one file an entry. `environment` (library versions) is part of every name."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = dict(environment)
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, record: type[T], *determined_by: Any) -> T | None:
        """The stored record, or None where there is none or it cannot be read."""
        path = self._path(record, determined_by)
        try:
            return TypeAdapter(record).validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def enter(self, value: T, *determined_by: Any) -> T:
        """Store `value` (whole or not at all) and return it."""
        path = self._path(type(value), determined_by)
        partial = path.with_suffix(".partial")
        partial.write_bytes(TypeAdapter(type(value)).dump_json(value, indent=1))
        os.replace(partial, path)
        return value

    def _path(self, record: type, determined_by: tuple[Any, ...]) -> Path:
        key = digests.of_json([record.__name__, self._environment, determined_by])
        return self._folder / f"{record.__name__.lower()}-{key}.json"
