"""The report as the three files that a run directory and a release hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from secure_export import whole
from secure_export.errors import ReleaseError
from secure_export.records.reported import Report
from secure_export.report.html import to_html
from secure_export.report.markdown import to_markdown
from secure_export.report.schema import FORMATS, dump_report


def documents(report: Report) -> Mapping[str, bytes]:
    """File name to content: `report.json` is the source of truth, the others are drawn from it."""
    return {
        "report.json": dump_report(report).encode(),
        "report.md": to_markdown(report).encode(),
        "report.html": to_html(report).encode(),
    }


def discard(folder: Path) -> None:
    """Remove the report of an earlier run: until this one has its own, nothing says what came of it.

    Raises:
        ReleaseError: it cannot be removed.
    """
    try:
        for name in FORMATS.values():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ReleaseError(
            f"{folder / name}: the report of an earlier run cannot be removed: {error.strerror or error}",
            hint="remove it yourself, or choose another --out",
        ) from error


def save(report: Report, folder: Path) -> None:
    """Write the three files into `folder`, each whole or not at all.

    Raises:
        ReleaseError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in documents(report).items():
            whole.write(folder / name, content)
    except OSError as error:
        raise ReleaseError(
            f"{folder}: the report cannot be written: {error.strerror or error}",
            hint="make room, or choose another --out",
        ) from error
