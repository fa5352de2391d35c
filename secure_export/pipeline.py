"""The whole job, in order; start reading here.

    load → locate → purify → compress → measure → judge → release

The two halves of the work are in `lane.py` (a model through every setting) and `defence.py` (locate, purify).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from secure_export import __version__, data, defence, digests, loading, registry
from secure_export.environment import versions
from secure_export.errors import LoadError, NoVerdict, PolicyError, ReleaseError
from secure_export.lane import Bench, at_the_head, through_settings
from secure_export.ledger import Ledger
from secure_export.policy import Policy, approve, check_plugins, judge
from secure_export.records import (
    Evidence,
    Finding,
    Progress,
    Purification,
    Report,
    ReportedSetting,
    SettingResult,
    SplitInfo,
    Splits,
    Subject,
    SubjectInfo,
    Suspect,
    Verdict,
    silent,
)
from secure_export.release import release, withdraw
from secure_export.report.documents import documents, save
from secure_export.runtimes import Runtime
from secure_export.triggers import Trigger

SCHEMA = 1
NOT_SHOWN = (
    "that no trigger exists: only the triggers listed above were applied",
    "anything about runtimes, compression settings or CPUs that are not named here",
    "anything about inputs unlike the clean samples",
)


def run(policy: Policy, run_dir: Path, *, progress: Progress = silent) -> Report:
    """Measure a model under a policy and release its files only when every rule holds.

    The same call on the same `run_dir` does what is still missing. Files appear in `run_dir/release` at once
    or not at all; a release of an earlier run is withdrawn before anything else happens.

    Raises:
        PolicyError: the policy cannot be used. NoVerdict: something could not be loaded or written.
    """
    clock = Clock()
    check_plugins(policy)
    with writing_to(run_dir):
        withdraw(run_dir / "release")
        with clock("load"):
            subject, splits = load(policy, progress)
            bench = open_bench(policy, run_dir, splits, progress)
        with clock("original"):
            original = at_the_head(subject.model, subject.head, "original", subject.sha256, bench)
            originals = through_settings(original, policy.expanded_settings(), bench)
        with clock("locate"):
            suspects = defence.locate(policy.locate, subject, originals, bench)
        with clock("purify"):
            model, identity, purification = defence.purify(policy, subject, suspects, bench)
        with clock("purified"):
            purified = at_the_head(model, subject.head, "purified", identity, bench, original.reference)
            purifieds = through_settings(purified, policy.expanded_settings(), bench)
        report = compose(policy, subject, splits, suspects, purification, originals, purifieds, clock.seconds)
        report = replace(report, verdict=judge(policy, report))
        return conclude(report, purifieds, run_dir)


def load(policy: Policy, progress: Progress) -> tuple[Subject, Splits]:
    """The clean samples, and the untrusted checkpoint as a model over the same raw inputs."""
    wanted, source = policy.subject, policy.data
    if wanted.model is None or wanted.architecture is None:
        raise PolicyError(
            "no model to work on", hint="give --model and --arch, or subject.model in the policy"
        )
    if source is None or source.path is None:
        raise PolicyError("no clean samples", hint="give --data, or data.path in the policy")
    path = Path(wanted.model)
    if not path.is_file():
        raise LoadError(f"no such model file: {path}")
    splits = data.split_data(
        source.path,
        holdout_source=source.holdout_path,
        fit=source.fit,
        calibration=source.calibration,
        holdout=source.holdout,
        seed=policy.seed,
        resize=source.resize,
        channels=source.channels,
        progress=progress,
    )
    subject = loading.load(
        path,
        wanted.architecture,
        classes=wanted.classes,
        head=wanted.head,
        mean=wanted.mean,
        std=wanted.std,
        input_shape=tuple(splits.fit.inputs.shape[1:]),
    )
    data.check_labels(splits, subject.classes)
    return subject, splits


def open_bench(policy: Policy, run_dir: Path, splits: Splits, progress: Progress) -> Bench:
    """Where files are made and what is already done."""
    folder = run_dir / "work"
    folder.mkdir(parents=True, exist_ok=True)
    triggers = {spec.name: registry.build(Trigger, "triggers", spec.plugin) for spec in policy.triggers}
    some = splits.calibration.floats(slice(0, 16))
    return Bench(
        folder=folder,
        ledger=Ledger(run_dir / "ledger", versions()),
        splits=splits,
        triggers=triggers,
        trigger_digests={
            spec.name: digests.of_json([spec.plugin, digests.of_arrays(triggers[spec.name](some).numpy())])
            for spec in policy.triggers
        },
        seed=policy.seed,
        progress=progress,
    )


def compose(
    policy: Policy,
    subject: Subject,
    splits: Splits,
    suspects: tuple[Suspect, ...],
    purification: Purification | None,
    originals: Sequence[SettingResult],
    purifieds: Sequence[SettingResult],
    timings: Mapping[str, float],
) -> Report:
    """Everything measured, as data, before it is judged."""
    settings = tuple(
        ReportedSetting(setting.name, setting.steps, setting.released, _named(original), _named(purified))
        for setting, original, purified in zip(policy.expanded_settings(), originals, purifieds, strict=True)
    )
    return Report(
        schema=SCHEMA,
        tool=__version__,
        policy_path=Path(policy.path).name,
        policy_sha256=policy.sha256,
        policy_text=policy.text,
        verdict=Verdict("no_verdict", ()),
        subject=SubjectInfo(
            path=subject.source.name,
            sha256=subject.sha256,
            architecture=subject.architecture,
            classes=subject.classes,
            class_names=splits.class_names,
            head=subject.head,
            input_shape=subject.input_spec.shape,
            parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        ),
        splits={
            name: SplitInfo(len(split), split.sha256)
            for name, split in (
                ("fit", splits.fit),
                ("calibration", splits.calibration),
                ("holdout", splits.holdout),
            )
        },
        suspects=suspects,
        purification=purification,
        settings=settings,
        evidence=Evidence(
            known_triggers=tuple({"name": spec.name, **spec.plugin} for spec in policy.triggers),
            trigger_search="none",
            not_shown=NOT_SHOWN,
        ),
        environment=environment(originals),
        timings=timings,
    )


def _named(result: SettingResult) -> SettingResult:
    """The file by its place in the run directory: a report travels and says nothing of this machine."""
    if result.artifact is None:
        return result
    path = Path(result.artifact.path.parent.name, result.artifact.path.name)
    return replace(result, artifact=replace(result.artifact, path=path))


def conclude(report: Report, purifieds: Sequence[SettingResult], run_dir: Path) -> Report:
    """Release the measured files when the verdict approves; keep the report either way.

    Raises:
        ReleaseError, IntegrityError: the files could not be released; the report then says no verdict.
    """
    if report.verdict.outcome != "released":
        save(report, run_dir)
        return report
    shipped = {setting.name for setting in report.settings if setting.released}
    artifacts = [r.artifact for r in purifieds if r.artifact is not None and r.setting in shipped]
    try:
        release(approve(report.verdict), artifacts, documents(report), run_dir / "release")
    except NoVerdict as error:
        failed = Finding("release", "all", None, None, None, 0, None, error.message)
        unreleased = Verdict("no_verdict", (*report.verdict.findings, failed))
        save(replace(report, verdict=unreleased), run_dir)
        raise
    save(report, run_dir)
    return report


@contextmanager
def writing_to(run_dir: Path) -> Iterator[None]:
    """A disk that is full or read-only is one clear line, wherever it shows."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReleaseError(
            f"{getattr(error, 'filename', None) or run_dir}: cannot be written: {reason}",
            hint="make room or choose another --out; the same command resumes",
        ) from error


def environment(results: Sequence[SettingResult]) -> Mapping[str, str]:
    """Versions, and for each runtime that measured a file its own options."""
    found = dict(versions())
    for kind in sorted({r.artifact.runtime for r in results if r.artifact is not None}):
        runtime = registry.build(Runtime, "runtimes", {"kind": kind})
        found |= {f"{kind}.{name}": value for name, value in runtime.environment().items()}
    return found


class Clock:
    """Seconds per stage, of this call (what came from the ledger costs nothing)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)
