"""What every runtime does before it trusts a file: read it once, and check the head that it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from secure_export.errors import CompressError
from secure_export.words import printable

if TYPE_CHECKING:
    from torch import Tensor


def read(path: Path) -> bytes:
    """The file's bytes; a session on them can reach no other file.

    Raises:
        CompressError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CompressError(f"cannot read {path.name}: {error.strerror}") from error


def check_head(rebuilt: Tensor, logits: Tensor, tolerance: float, file: str) -> None:
    """Refuse a head that does not give the file's logits.

    Raises:
        CompressError: further apart than `tolerance` times the largest logit (at least 1).
    """
    if rebuilt.shape != logits.shape:
        raise CompressError(f"head of {file}: gives {tuple(rebuilt.shape)}, logits are {tuple(logits.shape)}")
    difference = float((rebuilt - logits).abs().max())
    limit = tolerance * max(1.0, float(logits.abs().max()))
    if not difference <= limit:  # NaN fails too
        raise CompressError(f"head of {file}: its logits are off by {difference:.3g}, limit {limit:.3g}")


def printable_line(text: str) -> str:
    """The first line of what a library says, without control characters: it may quote names in a file."""
    return printable(text.strip().partition("\n")[0])
