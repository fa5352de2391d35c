"""The whole job, in order; start reading here.

    load → locate → purify → compress → measure → judge → release
    load → measure → locate → judge → release         a file of another tool, as it is

The two halves of the work are in `lane.py` (a model through every setting) and `defence.py` (locate, purify).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secure_export import data, defence, digests, evidence, incoming, loading, registry
from secure_export.composing import compose, described
from secure_export.environment import Clock, versions
from secure_export.errors import NoVerdict, PolicyError
from secure_export.lane import (
    Bench,
    at_the_head,
    beside_full_precision,
    cost_table,
    through_settings,
)
from secure_export.ledger import Ledger, user_key
from secure_export.policy import Policy, approve, check_plugins, judge
from secure_export.records.measured import Finding, SettingResult, Verdict
from secure_export.records.memory import Progress, Splits, Subject, silent
from secure_export.records.reported import Report
from secure_export.release import release, withdraw
from secure_export.report.documents import discard, documents, save
from secure_export.run_directory import apart, claimed, locked, sweep, unlinked, writing_to
from secure_export.runtimes import Options
from secure_export.triggers import Trigger


def run(policy: Policy, run_dir: Path, *, progress: Progress = silent) -> Report:
    """Measure a model under a policy and release its files only when every rule holds.

    The same call on the same `run_dir` does what is still missing. Files appear in `run_dir/release` at once
    or not at all; release and report of an earlier run are withdrawn before anything else happens.

    Raises:
        PolicyError: the policy cannot be used. NoVerdict: something could not be loaded or written.
    """
    clock = Clock()
    check_plugins(policy)
    apart(policy, run_dir)
    with writing_to(run_dir), locked(claimed(run_dir)):
        unlinked(run_dir)
        withdraw(run_dir / "release")
        discard(run_dir)
        work = gate if policy.subject.artifact is not None else whole_job
        report, purifieds = work(policy, run_dir, clock, progress)
        report = replace(report, verdict=judge(policy, report))
        return conclude(report, purifieds, run_dir)


def whole_job(
    policy: Policy, run_dir: Path, clock: Clock, progress: Progress
) -> tuple[Report, Sequence[SettingResult]]:
    """Everything up to the verdict, for a model whose architecture is known."""
    with clock("load"):
        subject, splits = load(policy, progress)
        bench = replace(open_bench(policy, run_dir, splits, progress), runtime=options(policy, subject))
    with clock("original"):
        original = at_the_head(subject.model, subject.head, "original", subject.identity, bench)
        originals = through_settings(original, policy.expanded_settings(), bench)
    with clock("locate"):
        suspects = defence.locate(policy.locate, subject, originals, bench, policy.expanded_settings())
    with clock("purify"):
        defended = defence.purify(policy, subject, suspects, bench)
        suspects += defended.suspects
    with clock("purified"):
        done = defended.purification
        purified = at_the_head(
            defended.model, subject.head, "purified", defended.identity, bench, original.reference, done
        )
        purifieds = through_settings(purified, policy.expanded_settings(), bench)
    with clock("evidence"):
        lanes = (original, originals), (purified, purifieds)
        gathered = evidence.gather(policy, lanes, subject.classes, bench)
    with clock("costs"):
        shipped = [setting.name for setting in policy.expanded_settings() if setting.released]
        files = beside_full_precision(purified, purifieds, shipped, bench) if policy.costs else []
        spent = cost_table(files, bench)
    info = described(subject, splits)
    report = compose(
        policy, info, bench, suspects, done, originals, purifieds, gathered, spent, clock.seconds
    )
    return report, purifieds


def gate(
    policy: Policy, run_dir: Path, clock: Clock, progress: Progress
) -> tuple[Report, Sequence[SettingResult]]:
    """Everything up to the verdict, for a file that another tool made: measured as it is."""
    with clock("load"):
        splits = load_data(policy, progress)
        bench = replace(open_bench(policy, run_dir, splits, progress), runtime=incoming.options(policy))
    with incoming.bounded():
        with clock("load"):
            given = incoming.take(Path(policy.subject.artifact or ""), bench)
            data.check_labels(splits, given.info.classes)
            against, baseline = incoming.compared_with(policy.subject, given.info.classes, bench)
        with clock("original"):
            original, purified = incoming.measured(given, against, bench)
        with clock("locate"):
            suspects = defence.locate(policy.locate, None, [original], bench)
        with clock("evidence"):
            lanes = (None, [original]), (None, [purified])
            gathered = evidence.gather(policy, lanes, given.info.classes, bench)
    with clock("costs"):
        spent = cost_table([*baseline, given.artifact], bench) if policy.costs else ()
    results = [original], [purified]
    further = incoming.not_shown(given)
    report = compose(
        policy, given.info, bench, suspects, None, *results, gathered, spent, clock.seconds, further
    )
    return report, [purified]


def load(policy: Policy, progress: Progress) -> tuple[Subject, Splits]:
    """The clean samples, and the untrusted checkpoint as a model over the same raw inputs.

    Raises:
        PolicyError: no model, architecture or data is named. LoadError: the checkpoint cannot become a
            classifier. DataError: the samples cannot be read, or are labelled with other classes.
    """
    wanted = policy.subject
    if wanted.model is None:
        raise PolicyError("no model to work on", hint="give --model, or subject.model in the policy")
    path = Path(wanted.model)
    loading.check_named(path, wanted)
    splits = load_data(policy, progress)
    subject = loading.as_named(path, wanted, tuple(splits.fit.inputs.shape[1:]))
    data.check_labels(splits, subject.classes)
    return subject, splits


def options(policy: Policy, subject: Subject) -> Options:
    """How files are opened: those that hold weights alone into the subject's architecture."""
    wanted = policy.subject
    moments = {"mean": wanted.mean, "std": wanted.std} if wanted.mean and wanted.std else {}
    shape = {"input_shape": subject.input_shape, "classes": subject.classes, "head": wanted.head}
    return {
        "safetensors": {"architecture": subject.architecture, **shape, **moments},
        "onnxruntime": {"precise": policy.precise_int8},
    }


def load_data(policy: Policy, progress: Progress) -> Splits:
    """The clean samples in their splits.

    Raises:
        PolicyError: no data is named. DataError: it cannot be read, or is too little.
    """
    source = policy.data
    if source.path is None:
        raise PolicyError("no clean samples", hint="give --data, or data.path in the policy")
    return data.split_data(
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


def open_bench(policy: Policy, run_dir: Path, splits: Splits, progress: Progress) -> Bench:
    """Where files are made and what is already done."""
    folder = run_dir / "work"
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    triggers = {spec.name: registry.build(Trigger, "triggers", spec.plugin) for spec in policy.triggers}
    some = splits.calibration.floats(slice(0, 16))
    return Bench(
        folder=folder,
        ledger=Ledger(run_dir / "ledger", versions(), user_key(progress)),
        splits=splits,
        triggers=triggers,
        trigger_digests={
            spec.name: digests.of_json([spec.plugin, digests.of_arrays(triggers[spec.name](some).numpy())])
            for spec in policy.triggers
        },
        seed=policy.seed,
        progress=progress,
    )


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
    try:
        save(report, run_dir)
    except BaseException:  # interrupted, too: what is released lies beside its report, or not at all
        withdraw(run_dir / "release")
        raise
    return report
