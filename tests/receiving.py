"""A release folder as somebody receives it, to be tampered with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from secure_export.cli import main
from secure_export.digests import of_file
from secure_export.policy import approve, judge
from secure_export.records.measured import Artifact
from secure_export.records.reported import Report, ReportedSetting
from secure_export.release import SUMS, release
from secure_export.report.schema import dump_report, load_report
from tests.judging import STEPS, make_policy, make_report, make_setting

POLICY = make_policy(release=["fp32", "int8"])


class Received:
    """Two models and their report, released; `seal` is what everybody can do who may write the folder."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "release"
        artifacts = [self._measured(root, setting) for setting in STEPS]
        settings = tuple(self._reported(artifact) for artifact in artifacts)
        report = make_report(*settings, policy_text=POLICY.text, policy_sha256=POLICY.sha256)
        verdict = judge(POLICY, report)
        self.original = replace(report, verdict=verdict)
        documents = {"report.json": dump_report(self.original).encode()}
        documents |= {"report.md": b"# Released\n", "report.html": b"<p>Released"}
        release(approve(verdict), artifacts, documents, self.folder)

    def verify(self, *flags: str) -> Result:
        return CliRunner().invoke(main, ["verify", str(self.folder), *flags])

    def judge(self) -> Result:
        policy = self.folder.with_name("policy.yaml")
        policy.write_text(POLICY.text)
        return CliRunner().invoke(main, ["judge", str(self.folder), "--policy", str(policy)])

    def file(self, name: str) -> Path:
        return self.folder / name

    def sums(self) -> str:
        return (self.folder / SUMS).read_text()

    def write_sums(self, text: str) -> None:
        (self.folder / SUMS).write_bytes(text.encode())

    def seal(self) -> None:
        """SHA256SUMS of what lies there now."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name != SUMS)
        self.write_sums("".join(f"{of_file(self.folder / name)}  {name}\n" for name in names))

    def edit(self, change: Callable[[Report], Report]) -> None:
        """The report changed, and the digests with it."""
        path = self.folder / "report.json"
        path.write_text(dump_report(change(load_report(path))))
        self.seal()

    def edit_artifact(self, name: str, /, **changes: Any) -> None:
        """What the report says of one released file."""

        def change(report: Report) -> Report:
            return replace(report, settings=tuple(map(changed, report.settings)))

        def changed(reported: ReportedSetting) -> ReportedSetting:
            if reported.name != name or reported.purified.artifact is None:
                return reported
            artifact = replace(reported.purified.artifact, **changes)
            return replace(reported, purified=replace(reported.purified, artifact=artifact))

        self.edit(change)

    @staticmethod
    def _measured(root: Path, setting: str) -> Artifact:
        content = setting.encode() * 999
        path = root / f"{setting}-measured.onnx"
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        return Artifact(setting, path, digest, len(content), "onnx", "onnxruntime")

    @staticmethod
    def _reported(artifact: Artifact) -> ReportedSetting:
        reported = make_setting(artifact.setting)
        assert reported.purified.artifact is not None
        named = replace(artifact, path=Path("work", artifact.path.name))
        named = replace(named, changes=reported.purified.artifact.changes)
        return replace(reported, released=True, purified=replace(reported.purified, artifact=named))


def does_not_hold(received: Received, *words: str, flags: tuple[str, ...] = (), code: int = 4) -> None:
    """One line, the exit code, no traceback, and not a file called ok."""
    result = received.verify(*flags)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.output
    assert len(errors[0]) < 500
    for word in words:
        assert word in errors[0]
    assert "ok:" not in result.output
