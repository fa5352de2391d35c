"""report.json as Markdown, for a step summary or a pull request; every text from outside is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from secure_export.records.measured import Finding
from secure_export.records.reported import Report
from secure_export.report import _evidence as searched
from secure_export.report import _story as story
from secure_export.report import _tables as tables
from secure_export.report import costs
from secure_export.words import plural

_ACTIVE = re.compile(r"([\\`*\[\]|])")
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


def to_markdown(report: Report) -> str:
    """The whole report, verdict first."""
    sections = (
        _verdict,
        _settings,
        _suspects,
        _purification,
        _evidence,
        _files,
        _costs,
        _held,
        _provenance,
        _policy,
    )
    drawn = ("\n".join(section(report)) for section in sections)
    return "\n\n".join(section for section in drawn if section) + "\n"


def escape(text: object) -> str:
    """`text` on one line with everything that Markdown or HTML would act on made harmless."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _EDGE_UNDERSCORE.sub(r"\\_", _ACTIVE.sub(r"\\\1", line))


def _table(header: Sequence[str], body: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for line in body:
        yield f"| {' | '.join(escape(cell) for cell in line)} |"


def _verdict(report: Report) -> Iterator[str]:
    yield f"# {tables.HEADLINES[report.verdict.outcome]}"
    yield ""
    yield f"**{escape(tables.sentence(report))}**"
    yield ""
    for fact in story.facts(report):
        yield f"- {fact.label}: **{escape(fact.value)}** ({escape(fact.note)})"
    failed, undecided, _ = tables.split_findings(report)
    for title, findings in (("Does not hold", failed), ("Could not be decided", undecided)):
        if findings:
            yield ""
            yield f"## {title}"
            yield ""
            yield from _findings(findings)


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    header = ("rule", "setting", "what", "numbers", "policy line")
    yield from _table(
        header,
        ((f.rule, f.setting, f.message, story.numbers(f), f.line or "always") for f in findings),
    )


def _settings(report: Report) -> Iterator[str]:
    yield f"## {story.lanes_title(report)}"
    yield ""
    body = []
    for row in tables.rows(report):
        name = f"{row.setting} ({tables.release_tag(report)})" if row.released else row.setting
        lane = f"{row.lane}, collapsed" if row.collapsed else row.lane
        if row.cells:
            body.append([name, lane, *(_cell(cell) for cell in row.cells)])
        else:
            body.append([name, lane, f"not measured: {row.unmeasured}", *[""] * (len(tables.COLUMNS) - 1)])
    yield from _table(("setting", "lane", *tables.COLUMNS), body)
    yield ""
    yield "Worst and lowest are taken over every trigger and every candidate target class."


def _cell(cell: tables.Cell) -> str:
    counted = f"{cell.value} ({cell.count})" if cell.count else cell.value
    return f"{counted} {cell.where}".strip()


def _suspects(report: Report) -> Iterator[str]:
    yield "## Localization"
    yield ""
    if not report.suspects:
        yield "No locator ran."
    for line in story.locator_lines(report):
        yield f"- {escape(line)}"
    for remark in (story.disagreement(report), story.wakes_when_compressed(report)):
        if remark:
            yield ""
            yield f"**{escape(remark)}**"


def _purification(report: Report) -> Iterator[str]:
    yield "## Purification"
    yield ""
    yield escape(story.purification_line(report))
    if ladder := story.ladder_lines(report):
        yield ""
        yield "Tried on the calibration split, in this order:"
        yield ""
        yield from (f"- {escape(line)}" for line in ladder)
    if report.purification is not None and report.purification.parameters:
        yield ""
        yield f"Parameters: {escape(story.inline(report.purification.parameters))}."


def _evidence(report: Report) -> Iterator[str]:
    evidence = report.evidence
    yield "## What was searched, and what was not"
    yield ""
    for trigger in evidence.known_triggers:
        yield f"- Known trigger: {escape(story.inline(trigger))}."
    yield f"- Search for unknown triggers: {escape(evidence.trigger_search)}."
    for gap in evidence.not_shown:
        yield f"- Not shown: {escape(gap)}"
    for gap in searched.gaps(report):
        yield f"- Not searched: {escape(gap)}"
    if rows := searched.search_rows(report):
        yield ""
        yield from _table(searched.HEADER, (row.cells for row in rows))
    if readings := searched.rounding_rows(report):
        yield ""
        yield "Traces in the rounding of quantized weights:"
        yield ""
        yield from _table(searched.ROUNDING_HEADER, readings)


def _files(report: Report) -> Iterator[str]:
    released = report.verdict.outcome == "released"
    yield "## Released files" if released else "## Files that would have been released"
    yield ""
    files = story.released_files(report)
    if not files:
        yield "None."
        return
    yield from _table(
        ("setting", "file", "sha256", "bytes"),
        ((file.setting, story.shipped_name(file), file.sha256, file.size) for file in files),
    )


def _costs(report: Report) -> Iterator[str]:
    if report.costs:
        yield "## Costs"
        yield ""
        yield from _table(costs.COLUMNS, costs.rows(report))
        yield ""
        yield escape(costs.explained(report))


def _held(report: Report) -> Iterator[str]:
    _, _, held = tables.split_findings(report)
    yield f"## Checks that hold ({len(held)})"
    yield ""
    if held:
        yield from _findings(held)


def _provenance(report: Report) -> Iterator[str]:
    subject = report.subject
    yield "## Provenance"
    yield ""
    shape = "×".join(str(side) for side in subject.input_shape)
    head = f"head layer `{escape(subject.head)}`," if subject.head else ""
    yield f"- Model: {escape(subject.path)}, {escape(subject.architecture)}, {head}".rstrip()
    yield f"  {subject.parameters:,} parameters, {subject.classes} classes, input {shape}"
    yield f"- Model sha256: `{escape(subject.sha256)}`"
    for name, split in report.splits.items():
        size = plural(split.samples, "sample")
        yield f"- Split {escape(name)}: {size}, sha256 `{escape(split.sha256)}`"
    yield f"- Tool: {escape(report.tool)}; {escape(story.inline(report.environment))}"
    yield f"- Seconds: {escape(story.inline({k: f'{v:.1f}' for k, v in report.timings.items()}))}"


def _policy(report: Report) -> Iterator[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", report.policy_text)), default=0))
    yield f"## Policy {escape(report.policy_path)}"
    yield ""
    yield f"sha256 `{escape(report.policy_sha256)}`"
    yield ""
    if report.overrides:
        yield f"Set on the command line or in the environment instead: {escape(story.overridden(report))}."
        yield ""
    yield f"{fence}yaml"
    yield report.policy_text.rstrip("\n")
    yield fence
