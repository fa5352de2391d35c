"""One exception tree: what happened, what was expected, what to do.

SecureExportError
├── PolicyError          2   usage, or a policy that cannot be used
├── Refused              3   measured, and a rule does not hold
└── NoVerdict            4   something could not be loaded, measured or written
    ├── LoadError            the checkpoint, or its architecture
    ├── DataError            the clean samples
    ├── CompressError        a step, a format or a runtime could not do its work on this model
    ├── IntegrityError       bytes are not the bytes that were measured
    └── ReleaseError         the destination cannot be written
"""

from __future__ import annotations

from typing import ClassVar


class SecureExportError(Exception):
    """Base of every error that the tool raises on purpose; carries its exit code and a hint."""

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class PolicyError(SecureExportError):
    """The policy or the command line cannot be used; nothing was measured."""

    exit_code = 2


class Refused(SecureExportError):
    """Everything was measured and at least one rule does not hold."""

    exit_code = 3


class NoVerdict(SecureExportError):
    """Nothing can be said: something is missing, unreadable or too small."""

    exit_code = 4


class LoadError(NoVerdict):
    """The checkpoint cannot become a model."""


class DataError(NoVerdict):
    """The clean samples cannot be used."""


class CompressError(NoVerdict):
    """A compression step, a format or a runtime failed on this model."""


class IntegrityError(NoVerdict):
    """A file's bytes are not those that were measured."""


class ReleaseError(NoVerdict):
    """The destination cannot be written."""
