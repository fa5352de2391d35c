"""The renderers: the verdict first, nothing fetched, nothing unescaped, and whatever a report may lack."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from secure_export.records.measured import (
    COLLAPSED,
    MIN_SCORE,
    UNREAD,
    SettingResult,
    Suspect,
    Unmeasured,
    Verdict,
)
from secure_export.records.reported import Report
from secure_export.records.searches import Rounding
from secure_export.report._tables import class_label
from secure_export.report.documents import documents, save
from secure_export.report.figures import localization
from secure_export.report.html import to_html
from secure_export.report.markdown import to_markdown
from secure_export.report.schema import dump_report, load_report, parse_report
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


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_a_report_that_was_read_again_draws_the_same_page(draw: Callable[[Report], str]) -> None:
    report = sample_report()
    assert report.purification is not None
    parameters = {"families": ("patch", "l2"), "views": {"ratios": (0.3, 0.5)}}
    report = dataclasses.replace(
        report, purification=dataclasses.replace(report.purification, parameters=parameters)
    )
    text = draw(report)
    assert draw(parse_report(dump_report(report))) == text
    assert "('patch'" not in text


@pytest.mark.parametrize("draw", [to_html, to_markdown])
def test_a_file_of_another_tool_has_one_lane_and_no_head(draw: Callable[[Report], str]) -> None:
    report = sample_report()
    subject = dataclasses.replace(report.subject, architecture="artifact", head="")
    setting = dataclasses.replace(report.settings[0], purified=report.settings[0].original)
    text = draw(
        dataclasses.replace(
            report, subject=subject, settings=(setting,), suspects=(), purification=None, disagreements=()
        )
    )
    assert "as received" in text
    assert (
        "original"
        not in text.split("Localization")[0].split("Measured as received")[1].split("ACC drop is")[0]
    )
    assert "93.1% → 93.1%" not in text
    assert "judged as it is" in text
    assert "head" not in text.split("Provenance")[1].split("sha256")[0]


def test_a_class_that_has_no_name_of_its_own_is_said_once() -> None:
    report = sample_report()
    assert class_label(report, 3) == "class 3 (cat)"
    subject = dataclasses.replace(report.subject, class_names=tuple(map(str, range(10))))
    assert class_label(dataclasses.replace(report, subject=subject), 3) == "class 3"


def test_the_score_that_naming_takes_is_drawn_where_the_record_has_it() -> None:
    report = sample_report()
    told = Suspect("latent-shift", "int8", 0, (0.3, *[0.1] * 9), {MIN_SCORE: 0.2})
    drawn, plain = (
        localization(dataclasses.replace(report, suspects=(s,))) for s in (told, report.suspects[0])
    )
    assert drawn is not None
    assert plain is not None
    assert "Dotted" in drawn.caption
    assert "Dotted" not in plain.caption
    assert "names class 0 (airplane)" in drawn.svg
