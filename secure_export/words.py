"""What libraries and files say, made fit for one line of a message."""

from __future__ import annotations

LONGEST = 200
"""Characters of a name that a message shows."""


def first_line(error: BaseException) -> str:
    """The reason without the traceback that libraries append; the exception's type where it gives none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def described(cause: BaseException) -> str:
    """Type and first line of an exception, for a message of one line."""
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {printable(lines[0])}" if lines else type(cause).__name__


def plural(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """`text` on one line without control characters, cut where it is long, for a message."""
    safe = escaped(text)
    return safe if len(safe) <= LONGEST else safe[:LONGEST] + "..."


def escaped(text: str, keep: str = "") -> str:
    """`text` without control characters, so that no name in a file can steer a terminal or a log."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
