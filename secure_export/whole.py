"""Files that appear whole or not at all, and never through a link that somebody laid there."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """The file with this content; what lies at its place, or at its partial one, is replaced, not written to.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    os.replace(partial, path)
