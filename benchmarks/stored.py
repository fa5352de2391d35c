"""Results as JSON that several commands add to: whole or not at all, and by one command at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

MODELS: Mapping[str, Any] = {"models": {}}
"""Results that nothing was added to."""


def read(path: Path, empty: Mapping[str, Any] = MODELS) -> dict[str, Any]:
    """What is stored so far; a copy of `empty` where nothing is."""
    content: dict[str, Any] = json.loads(path.read_text() if path.is_file() else json.dumps(empty))
    return content


def write(content: Mapping[str, Any], path: Path) -> None:
    """The content as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@contextmanager
def changed(path: Path, empty: Mapping[str, Any] = MODELS) -> Iterator[dict[str, Any]]:
    """What is stored now, to be changed in place and written again.

    Others wait meanwhile, so measure before: a command that keeps what it read at its start would write over
    the rows that another has added since.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        content = read(path, empty)
        yield content
        write(content, path)
