"""report.json as one self-contained HTML file: inline CSS and SVG, nothing fetched, nothing run."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secure_export.records.reported import Report
from secure_export.report import _evidence as searched
from secure_export.report import _story as story
from secure_export.report import _tables as tables
from secure_export.report import costs, figures
from secure_export.words import plural


def to_html(report: Report) -> str:
    """The whole report, verdict first; every text from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("secure_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = _trusted_svg
    failed, undecided, held = tables.split_findings(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=tables,
        plural=plural,
        story=story,
        costs=costs,
        searched=searched,
        failed=failed,
        undecided=undecided,
        held=held,
        sweeps=figures.sweeps(report),
        localization=figures.localization(report),
        history=figures.history(report),
    )


def _trusted_svg(drawing: figures.Drawing) -> Markup:
    """matplotlib has escaped every text in its SVG."""
    return Markup(drawing.svg)  # noqa: S704
