"""The renderers: the verdict first, nothing fetched, nothing unescaped, and whatever a report may lack."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from secure_export.records.measured import COLLAPSED, UNREAD, SettingResult, Suspect, Unmeasured, Verdict
from secure_export.records.reported import Report
from secure_export.records.searches import Rounding
from secure_export.report.documents import documents, save
from secure_export.report.html import to_html
from secure_export.report.markdown import to_markdown
from secure_export.report.schema import load_report
from tests.report_sample import sample_report

GOLDEN = Path(__file__).parent / "golden" / "report.md"


def test_markdown_is_the_golden_one() -> None:
    """UPDATE_GOLDENS=1 rewrites it; read the diff then."""
    drawn = to_markdown(sample_report())
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text(drawn)
    assert drawn == GOLDEN.read_text()


def test_html_is_one_file_that_fetches_nothing() -> None:
    page = to_html(sample_report())
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", page)
    assert not re.search(r"@import|url\((?!#|['\"]?data:)", page)
    assert "<script" not in page


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_verdict_stands_first_and_every_setting_in_it(draw: object) -> None:
    report = sample_report()
    text = draw(report)  # type: ignore[operator]
    headline = {"released": "Released", "refused": "Refused", "no_verdict": "No verdict"}
    body = text[text.find("<body") :] if "<body" in text else text
    assert headline[report.verdict.outcome] in body[:2500]
    for setting in report.settings:
        assert setting.name in text


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_a_rounding_with_too_few_residues_is_drawn(draw: Callable[[Report], str]) -> None:
    report = sample_report()
    few = Rounding("original", "int8", layers=2, draws=19)
    assert (few.ks, few.edge) == (None, None)
    assert "(19 draws)" in draw(
        dataclasses.replace(report, evidence=dataclasses.replace(report.evidence, roundings=(few,)))
    )


def test_names_from_outside_cannot_write_markup() -> None:
    report = sample_report()
    hostile = "<script>alert(1)</script>"
    subject = dataclasses.replace(
        report.subject, path=hostile, class_names=(hostile, *report.subject.class_names[1:])
    )
    page = to_html(dataclasses.replace(report, subject=subject, policy_text=hostile))
    assert hostile not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_what_flags_said_instead_of_the_policy_is_told(draw: Callable[[Report], str]) -> None:
    text = draw(dataclasses.replace(sample_report(), overrides={"purify": None, "seed": 5}))
    assert "purify: off, seed: 5" in text
    assert "command line" in text
    assert "command line" not in draw(sample_report())


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_a_locator_that_judged_nothing_does_not_say_that_there_is_nothing(
    draw: Callable[[Report], str],
) -> None:
    silent = (
        Suspect("latent-shift", "fp32", None, (0.1, 0.2), {UNREAD: "too few classes"}),
        Suspect("latent-shift", "int8", None, (0.1, 0.2), {COLLAPSED: True}),
    )
    report = dataclasses.replace(sample_report(), suspects=silent, purification=None, disagreements=())
    text = draw(report)
    assert "latent-shift could not read the weights on fp32" in text
    assert "latent-shift did not judge, the model having collapsed, on int8" in text
    assert "names no class" not in text
    assert "not known" in text


def test_no_name_can_steer_a_terminal_that_shows_the_report() -> None:
    report = sample_report()
    names = ("\x1b[31mred", *report.subject.class_names[1:])
    text = to_markdown(
        dataclasses.replace(report, subject=dataclasses.replace(report.subject, class_names=names))
    )
    assert "\x1b" not in text


def bare(report: Report) -> Report:
    """No suspects, no purification, nothing measured."""

    def unmeasured(result: SettingResult) -> SettingResult:
        reason = Unmeasured(result.lane, result.setting, "the toolchain fell over")
        return SettingResult(result.lane, result.setting, None, None, reason)

    settings = tuple(
        dataclasses.replace(s, original=unmeasured(s.original), purified=unmeasured(s.purified))
        for s in report.settings
    )
    return dataclasses.replace(
        report, suspects=(), purification=None, settings=settings, verdict=Verdict("no_verdict", ())
    )


def test_report_that_lacks_everything_still_opens(tmp_path: Path) -> None:
    report = bare(sample_report())
    save(report, tmp_path)
    assert "the toolchain fell over" in (tmp_path / "report.html").read_text()
    assert "the toolchain fell over" in (tmp_path / "report.md").read_text()
    assert load_report(tmp_path / "report.json") == report


def test_every_report_says_what_was_not_searched() -> None:
    report = sample_report()
    for content in documents(report).values():
        assert report.evidence.not_shown[0].split(":")[0] in content.decode()
