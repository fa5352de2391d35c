"""A release folder on the receiving side: its files, its report and its verdict agree. Needs no torch.

    SHA256SUMS → names in the folder → their bytes → the files that the report releases → its verdict again

Nothing of it is signed. Whoever can write the folder can make all of it agree, so that it is the folder that
somebody made is shown only by a digest that came another way.
"""

from __future__ import annotations

import hashlib
import math
import re
from codecs import BOM_UTF8
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from secure_export.errors import IntegrityError, NoVerdict, PolicyError
from secure_export.plain_files import Held, content, held, names, opened
from secure_export.policy import MAX_BYTES, Policy, for_report, judge, parse_policy
from secure_export.policy.schema import ARTIFACT, PATHS
from secure_export.records.measured import Artifact, Finding, Verdict
from secure_export.records.reported import Report, ReportedSetting
from secure_export.release import NAME, SUMS, shipped_as
from secure_export.report.schema import FORMATS, parse_report
from secure_export.words import LONGEST

REPORT = FORMATS["json"]
LARGEST_SUMS, LARGEST_REPORT = 1_000_000, 100_000_000
"""Bytes of what is read as a whole; real ones have a hundredth of that."""
DIGEST = re.compile(r"[0-9a-f]{64}")
OVERRIDABLE = ("subject", "data", "seed", "purify")
"""Sections in which flags win over a policy: no verdict follows from them."""


@dataclass(frozen=True)
class Verified:
    """A folder whose files and report agree; whether it is good enough is for the verdict to say."""

    files: tuple[Held, ...]
    """By name; SHA256SUMS is the last."""
    models: Mapping[str, str]
    """File name to the setting that the report releases it as."""
    report: Report
    policies: tuple[tuple[str, str], ...]
    """Name and sha256 of those that judged it: the report's own and, where that releases, the receiver's."""
    verdict: Verdict
    """Of the last of them."""
    anchor: str
    """The file whose digest came another way; "" where none did."""


def verify(folder: Path, policy: Policy | None = None, sha256: str | None = None) -> Verified:
    """Hold the files of `folder` against its SHA256SUMS and its report, and judge the report again.

    `policy` is the receiver's own, which has to release it too; `sha256` is of SHA256SUMS or report.json,
    come another way than the folder. Every file is opened once and read through that; no link is followed.

    Raises:
        IntegrityError: files, report and verdict do not agree. NoVerdict: something cannot be read or judged.
        PolicyError: the receiver's policy cannot be used on it.
    """
    with opened(folder) as descriptor:
        sums, text = content(descriptor, SUMS, LARGEST_SUMS)
        listed = parse_sums(text)
        check_names(listed, names(descriptor, len(listed) + 2))
        report_json, text = content(descriptor, REPORT, LARGEST_REPORT)
        others = [held(descriptor, name) for name in listed if name != REPORT]
    files = {file.name: file for file in (report_json, *others)}
    check_digests(listed, files)
    anchor = anchored((sums, report_json), sha256)
    report = _report(text)
    models = check_models(report, files)
    policies = [(report.policy_path, report.policy_sha256)]
    verdict = judged_again(report)
    if policy is not None and verdict.outcome == "released":
        policies.append((policy.path, policy.sha256))
        verdict = judged_by(policy, report)
    ordered = (*(files[name] for name in sorted(files)), sums)
    return Verified(ordered, models, report, tuple(policies), verdict, anchor)


# ---- The files --------------------------------------------------------------------------------------------


def parse_sums(text: bytes) -> Mapping[str, str]:
    """File name to digest, as release() writes them: nothing that a path could be made of.

    Raises:
        IntegrityError: a line is anything else, or names SHA256SUMS or a file that another line names.
    """
    *lines, rest = text.decode("utf-8", errors="backslashreplace").split("\n")
    if rest or not lines:
        raise IntegrityError(f"{SUMS}: it is cut off: got {_shown(rest)} where a line should end")
    listed: dict[str, str] = {}
    taken = {SUMS.casefold()}
    for number, line in enumerate(lines, start=1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if not DIGEST.fullmatch(digest) or gap != "  " or not NAME.fullmatch(name):
            raise IntegrityError(
                f"{SUMS}:{number}: got {_shown(line)}, expected a sha256, two blanks and a plain file name",
                hint="letters, digits and ._@=+- only, as every release is written",
            )
        if name.casefold() in taken:
            raise IntegrityError(f"{SUMS}:{number}: {name} is named before, or is this file itself")
        taken.add(name.casefold())
        listed[name] = digest
    return listed


def check_names(listed: Mapping[str, str], found: set[str]) -> None:
    """The folder holds what SHA256SUMS names and SHA256SUMS itself, and nothing else.

    Raises:
        IntegrityError: a file too many, or one that is missing.
    """
    wanted = {*listed, SUMS}
    if extra := sorted(found - wanted):
        raise IntegrityError(f"{_shown(extra[0])} lies in the folder, and {SUMS} does not name it")
    if missing := sorted(wanted - found):
        raise IntegrityError(f"{missing[0]} is missing: {SUMS} names it")
    if REPORT not in listed:
        raise IntegrityError(f"{SUMS} names no {REPORT}: no release of this tool")


def check_digests(listed: Mapping[str, str], files: Mapping[str, Held]) -> None:
    """Every file has the bytes that SHA256SUMS says.

    Raises:
        IntegrityError: one has others.
    """
    for name, digest in sorted(listed.items()):
        if files[name].sha256 != digest:
            raise IntegrityError(
                f"{name}: got sha256 {files[name].sha256}, expected {digest} as {SUMS} says",
                hint="the file was changed or damaged after the release: get it again",
            )


def anchored(files: tuple[Held, ...], sha256: str | None) -> str:
    """The name of the file that has the digest; "" where none is given.

    Raises:
        IntegrityError: none of the files has it.
    """
    if sha256 is None:
        return ""
    for file in files:
        if file.sha256 == sha256:
            return file.name
    got = ", ".join(f"{file.name} {file.sha256}" for file in files)
    raise IntegrityError(f"got sha256 {got}, expected {sha256}", hint="this is not the folder that was meant")


# ---- The report -------------------------------------------------------------------------------------------


def check_models(report: Report, files: Mapping[str, Held]) -> Mapping[str, str]:
    """File name to setting: what the report releases and what lies in the folder, one to one.

    Raises:
        IntegrityError: a file that the report does not name, one that it names is missing, or it has another
            digest or size than the one that was measured.
    """
    shipped = {shipped_as(one): one for one in map(_artifact, report.settings) if one is not None}
    wanted = {*shipped, *FORMATS.values()}
    if len(wanted) < len(_released(report)) + len(FORMATS):
        raise IntegrityError(f"{REPORT}: two files of the release have one name")
    if extra := sorted(files.keys() - wanted):
        raise IntegrityError(f"{extra[0]}: {REPORT} releases no such file")
    if missing := sorted(wanted - files.keys()):
        raise IntegrityError(f"{_shown(missing[0])} is missing: it belongs to the release of this {REPORT}")
    for name, artifact in shipped.items():
        measured = Held(name, artifact.size, artifact.sha256)
        if files[name] != measured:
            raise IntegrityError(
                f"{name}: got {_bytes(files[name])}, expected {_bytes(measured)} as measured in {REPORT}",
                hint="these are not the bytes that the verdict is about",
            )
    return {name: artifact.setting for name, artifact in shipped.items()}


def judged_again(report: Report) -> Verdict:
    """What follows from the report by the policy whose text it carries.

    Raises:
        IntegrityError: it releases, and that is not the verdict that the report holds or not what the policy
            lets ship. NoVerdict: that policy cannot be used.
    """
    policy = carried(report)
    verdict = judge(policy, report)
    if verdict.outcome != "released":
        return verdict
    findings, stored = verdict.findings, report.verdict.findings
    same = len(findings) == len(stored) and all(map(_same, findings, stored))
    if report.verdict.outcome != "released" or not same:
        raise IntegrityError(
            f"{REPORT} holds another verdict than follows from what it counts",
            hint=f"it was edited, or version {_shown(report.tool)}, which wrote it, judges otherwise",
        )
    if sorted(_binding(policy)) != sorted(_released(report)):
        raise IntegrityError(
            f"{REPORT} releases {_listing(_released(report))}, and its policy {_listing(_binding(policy))}"
        )
    return verdict


def judged_by(policy: Policy, report: Report) -> Verdict:
    """What follows from the report by the receiver's policy.

    Raises:
        PolicyError: it cannot be used on this report. NoVerdict: it does not release what ships, so its rules
            on released settings would bind other files.
    """
    fitted = for_report(policy, report)
    if unbound := set(_released(report)) - set(_binding(fitted)):
        raise NoVerdict(
            f"{_listing(unbound)} ships, and {policy.path} releases {_listing(_binding(fitted))}",
            hint="name it under `release`, so that the rules on what is released bind it",
        )
    return judge(fitted, report)


def carried(report: Report) -> Policy:
    """The policy whose text the report carries, with what the command line said instead.

    Raises:
        IntegrityError: the text has another digest than the report says, or it is overridden as no flag can.
        NoVerdict: this version cannot use it.
    """
    raw = report.policy_text.encode()
    if report.policy_sha256 not in (hashlib.sha256(mark + raw).hexdigest() for mark in (b"", BOM_UTF8)):
        raise IntegrityError(f"{REPORT}: the policy in it has not the sha256 that stands beside it")
    for key in report.overrides:
        if key in PATHS or key.partition(".")[0] not in OVERRIDABLE:
            raise IntegrityError(f"{REPORT}: {_shown(key)} is said to be overridden, which no flag does")
    if len(raw) > MAX_BYTES:
        raise NoVerdict(f"{REPORT}: {len(raw)} bytes are no policy (at most {MAX_BYTES})")
    overrides = dict(report.overrides)
    if report.subject.architecture == ARTIFACT:
        # A report names no path. Whether there was a model to compare with shows in what was counted.
        overrides |= {"subject.artifact": report.subject.path, "subject.model": report.subject.path}
    try:
        return parse_policy(report.policy_text, report.policy_path, overrides, sha256=report.policy_sha256)
    except PolicyError as error:
        raise NoVerdict(
            f"the policy in {REPORT} cannot be used: {error.message}",
            hint=error.hint or f"use the version of secure-export that wrote it ({_shown(report.tool)})",
        ) from error


def _artifact(setting: ReportedSetting) -> Artifact | None:
    """What ships of a setting; None where it does not."""
    artifact = setting.purified.artifact
    if setting.released and (artifact is None or artifact.setting != setting.name):
        raise IntegrityError(
            f"{REPORT}: setting {_shown(setting.name)} is released without a file of its own"
        )
    return artifact if setting.released else None


def _released(report: Report) -> list[str]:
    return [setting.name for setting in report.settings if setting.released]


def _binding(policy: Policy) -> list[str]:
    return [setting.name for setting in policy.expanded_settings() if setting.released]


def _same(one: Finding, other: Finding) -> bool:
    """Whether two findings say the same; a bound may differ in its last bits between versions of scipy."""
    close = one.bound == other.bound or (
        one.bound is not None and other.bound is not None and math.isclose(one.bound, other.bound)
    )
    return close and replace(one, bound=None) == replace(other, bound=None)


def _report(text: bytes) -> Report:
    try:
        return parse_report(text.decode(), REPORT)
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{REPORT}: no UTF-8 text (byte {error.start})") from error
    except PolicyError as error:  # a schema number; here it is no fault of the command line
        raise NoVerdict(error.message, hint=error.hint) from error


def _listing(settings: Collection[str]) -> str:
    return ", ".join(map(_shown, sorted(settings))) or "nothing"


def _bytes(file: Held) -> str:
    return f"{file.size} bytes of sha256 {file.sha256}"


def _shown(text: str) -> str:
    """In ASCII, so that nobody takes one letter for another that looks like it."""
    shown = ascii(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
