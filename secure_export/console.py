"""What a person sees: progress with the time left on stderr, the result as a table on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from secure_export.records.measured import Finding
from secure_export.records.memory import Progress, silent
from secure_export.records.reported import Report

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from secure_export.report._tables import Cell
    from secure_export.verify import Verified

QUIET_SECONDS = 2.0
"""A stage shorter than this needs no line in a log."""


@contextmanager
def showing(quiet: bool) -> Iterator[Progress]:
    """A Progress for the terminal: bars where somebody looks, timed lines where a file does."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _Drawn(bars)
    else:
        yield _Logged()


class _Drawn:
    """One bar for each thing that is under way; finished ones go."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        group = what.split(":")[0]
        if group not in self._tasks:
            self._tasks[group] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[group], description=what, completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(group))


class _Logged:
    """A line when something new begins, and every ten seconds while it lasts."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._started.setdefault(what, now)
        if done >= total:
            self._started.pop(what)
            if now - began > QUIET_SECONDS:
                self._line(f"{what}: {now - began:.0f}s", now)
        elif now - self._last > self.EVERY:
            left = f", {(now - began) / done * (total - done):.0f}s left" if done and now > began else ""
            self._line(f"{what} {done}/{total}{left}", now)

    def _line(self, text: str, now: float) -> None:
        self._last = now
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def table(report: Report) -> str:
    """Purified beside original, setting by setting, as text."""
    from rich.console import Console
    from rich.table import Table

    from secure_export.report import _tables

    shown = (0, 1, 2, 3, 4)
    drawn = Table("setting", "lane", *(_tables.COLUMNS[i] for i in shown), box=None, pad_edge=False)
    for row in _tables.rows(report):
        name = f"{row.setting} *" if row.released and row.lane == "purified" else row.setting
        cells = [_words(row.cells[i]) for i in shown] if row.cells else [f"unmeasured: {row.unmeasured}"]
        drawn.add_row(name, row.lane, *cells)
    console = Console(width=150, markup=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _words(cell: Cell) -> str:
    return f"{cell.value} {cell.where}".strip()


def conclusion(report: Report, folder: str) -> list[str]:
    """The last lines: what came of it, and for a refusal every rule that does not hold."""
    from secure_export.report import _tables

    lines = [finding_line(f) for f in report.verdict.findings if not f.passed]
    headline = _tables.HEADLINES[report.verdict.outcome].lower()
    place = f" ({folder}/release)" if report.verdict.outcome == "released" else ""
    return [*lines, f"{headline}: {_tables.sentence(report)}{place}", f"report: {folder}/report.html"]


def finding_line(finding: Finding) -> str:
    """`fails: lift int8: message (policy line 12; 4200 samples could decide)`."""
    mark = {True: "ok", False: "fails", None: "undecided"}[finding.passed]
    extra = []
    if finding.line is not None:
        extra.append(f"policy line {finding.line}")
    if finding.needed is not None:
        extra.append(f"{finding.needed} samples could decide")
    tail = f" ({'; '.join(extra)})" if extra else ""
    return f"{mark}: {finding.rule} {finding.setting}: {finding.message.splitlines()[0]}{tail}"


def verified_lines(found: Verified) -> list[str]:
    """A line a file, what does not hold, by which policies, and what all of it shows and does not."""
    from secure_export.report import _story

    own, *others = (f"{name}, sha256 {digest}" for name, digest in found.policies)
    instead = f"; instead of its text {_story.overridden(found.report)}" if found.report.overrides else ""
    verdict = {"released": "holds", "refused": "refused", "no_verdict": "no verdict"}[found.verdict.outcome]
    return [
        *(f"ok: {file.name}: {_matched(file.name, found)}; sha256 {file.sha256}" for file in found.files),
        *(finding_line(finding) for finding in found.verdict.findings if not finding.passed),
        f"judged again by the report's own policy: {own}{instead}",
        *(f"judged again by yours: {other}" for other in others),
        f"{verdict}: files and report agree; {_known(found.anchor)}",
    ]


def _matched(name: str, found: Verified) -> str:
    if name in found.models:
        return f"the bytes that were measured as {found.models[name]}"
    if name == found.files[-1].name:
        return "names these files and no other"
    if name == "report.json":
        return "names these models, and has the counts that were judged again"
    return "as SHA256SUMS says, not held against report.json"


def _known(anchor: str) -> str:
    if not anchor:
        return (
            "nothing is signed, so this says not who made them (--sha256 takes a digest that you were told)"
        )
    rest = "; report.md, report.html and SHA256SUMS are not under it" if anchor == "report.json" else ""
    return f"nothing is signed, but {anchor} has the digest that you were told{rest}"
