"""One model through every setting: compress → write → hash → measure that file.

The original and the purified model take this same road. What was already done is taken from the ledger.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from secure_export import costs, digests, registry
from secure_export.compressors import Compressor, Context, FileStep, ModuleStep
from secure_export.errors import CompressError, NoVerdict
from secure_export.formats import Format
from secure_export.ledger import Ledger
from secure_export.measure import Reference, logits_of, measure
from secure_export.policy import Setting
from secure_export.purifiers import Purifier, class_after_class
from secure_export.records.measured import (
    Artifact,
    Change,
    Cost,
    Lane,
    Measurement,
    SettingResult,
    Unmeasured,
    asked,
)
from secure_export.records.memory import Progress, Splits
from secure_export.records.reported import Purification
from secure_export.runtimes import Options
from secure_export.runtimes import runtime as runtime_of
from secure_export.runtimes.torch_eager import from_module
from secure_export.triggers import Trigger

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Written:
    """The file after the module steps, before the file steps; settings with the same beginning share it."""

    path: Path
    sha256: str
    changes: tuple[Change, ...]
    parameters: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Bench:
    """Work folder, ledger, splits, triggers and seed, which both lanes share."""

    folder: Path
    ledger: Ledger
    splits: Splits
    triggers: Mapping[str, Trigger]
    trigger_digests: Mapping[str, str]
    """By name: what each trigger does to some samples, for its picture or code may change under one name."""
    seed: int
    progress: Progress
    runtime: Options = field(default_factory=dict)
    """Options of the runtimes that open the files."""


@dataclass(frozen=True)
class Lined:
    """A full-precision model at the head of its lane; `identity` is the digest that names it."""

    lane: Lane
    model: nn.Module
    head: str
    identity: str
    reference: Reference
    purification: Purification | None = None
    """How the model came about, for steps that do it again to what was made of it."""


def at_the_head(
    model: nn.Module,
    head: str,
    lane: Lane,
    identity: str,
    bench: Bench,
    against: Reference | None = None,
    purification: Purification | None = None,
) -> Lined:
    """A full-precision model with its own logits on the holdout; `against` is the untouched subject's."""
    bench.progress(f"{lane}: full precision", 0, 1)
    logits = logits_of(from_module(model), bench.splits.holdout)
    predictions = logits.argmax(1) if against is None else against.subject_predictions
    bench.progress(f"{lane}: full precision", 1, 1)
    # Code outside the model's buffers may be other than before: what it answers names the function, too.
    function = digests.of_json([identity, digests.of_arrays(logits.numpy())])
    return Lined(lane, model, head, function, Reference(predictions, logits), purification)


def through_settings(lined: Lined, settings: Iterable[Setting], bench: Bench) -> list[SettingResult]:
    """Every setting of one lane; one that cannot be made or measured is a value that no rule can pass."""
    settings = list(settings)
    results = []
    for done, setting in enumerate(settings):
        bench.progress(f"{lined.lane}: {setting.name}", done, len(settings))
        results.append(_through(lined, setting, bench))
    bench.progress(f"{lined.lane}: all settings", len(settings), len(settings))
    return results


def _through(lined: Lined, setting: Setting, bench: Bench, *, measuring: bool = True) -> SettingResult:
    artifact = None
    try:
        artifact = make(lined, setting, bench)
        measurement = measured(lined.lane, lined.reference, artifact, bench) if measuring else None
    except NoVerdict as error:
        reason, detail = error.message, error.hint
    except Exception as error:  # noqa: BLE001 - whatever a toolchain raises, this setting is not known to hold
        reason, detail = f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc()
    else:
        return SettingResult(lined.lane, setting.name, artifact, measurement)
    unmeasured = Unmeasured(lined.lane, setting.name, reason, detail)
    return SettingResult(lined.lane, setting.name, artifact, None, unmeasured)


def made(lined: Lined, settings: Iterable[Setting], bench: Bench) -> list[SettingResult]:
    """The files of one lane, unmeasured; where `artifact` is None, `unmeasured` says why."""
    return [_through(lined, setting, bench, measuring=False) for setting in settings]


def make(lined: Lined, setting: Setting, bench: Bench) -> Artifact:
    """The setting's file, hashed as it lies on disk.

    Raises:
        CompressError: a step or the format failed, or a module step follows a file step.
    """
    steps = steps_of(lined, setting)
    first_file_step = next((i for i, step in enumerate(steps) if isinstance(step, FileStep)), len(steps))
    module_steps, file_steps = steps[:first_file_step], steps[first_file_step:]
    form = registry.build(Format, "formats", setting.format)
    written = _written(lined, setting, module_steps, form, bench)
    determined_by = (written.sha256, setting.steps, bench.splits.calibration.sha256, bench.seed)
    known = bench.ledger.find(Artifact, *determined_by)
    if known is not None and _intact(known.path, known.sha256):
        return replace(known, setting=setting.name)
    path, changes = written.path, list(written.changes)
    for step in file_steps:
        if not isinstance(step, FileStep):
            raise CompressError(
                f"{setting.name}: {step.kind} works on the module, but stands after a step on the file",
                hint="put the steps on the module first",
            )
        target = bench.folder / f"{digests.of_json([path.name, step.kind, repr(step)])[:16]}{form.suffix}"
        changes.append(step.on_file(path, target, _context(lined, bench)))
        path = target
    artifact = Artifact(
        setting=setting.name,
        path=path,
        sha256=digests.of_file(path),
        size=path.stat().st_size,
        format=form.kind,
        runtime=form.runtime,
        changes=tuple(changes),
        parameters=written.parameters,
        macs=written.macs,
    )
    return bench.ledger.enter(artifact, *determined_by)


def steps_of(lined: Lined, setting: Setting) -> list[Compressor]:
    """The setting's chain in this lane."""
    specs = asked(setting.steps, purified=lined.purification is not None)
    return [registry.build(Compressor, "compressors", spec) for spec in specs]


def cost_table(files: Sequence[Artifact], bench: Bench) -> tuple[Cost, ...]:
    """What each file costs, the first being what the others are compared with: all measured in this call."""
    together = [file.sha256 for file in files]
    shape = tuple(bench.splits.calibration.inputs.shape[1:])
    found = []
    for done, file in enumerate(files):
        bench.progress("costs", done, len(files))
        known = bench.ledger.find(Cost, file.sha256, together)
        if known is None:
            known = bench.ledger.enter(costs.measured(file, shape, bench.runtime), file.sha256, together)
        found.append(replace(known, setting=file.setting))
    bench.progress("costs", len(files), len(files))
    return tuple(found)


def beside_full_precision(
    lined: Lined, results: Sequence[SettingResult], shipped: Sequence[str], bench: Bench
) -> list[Artifact]:
    """Full precision as ONNX and the shipped files; none where there is nothing to compare them with."""
    baseline = Setting("fp32 ONNX", (), {"kind": "onnx"}, released=False)
    try:
        first = make(lined, baseline, bench)
    except NoVerdict:
        return []
    return [first, *(r.artifact for r in results if r.artifact is not None and r.setting in shipped)]


def unrounded(lined: Lined, setting: Setting, bench: Bench) -> Path | None:
    """The float file that the setting's steps on files began with; None where there is no such step."""
    steps = steps_of(lined, setting)
    module_steps = [step for step in steps if isinstance(step, ModuleStep)]
    if len(module_steps) == len(steps):
        return None
    form = registry.build(Format, "formats", setting.format)
    return _written(lined, setting, module_steps, form, bench).path


def measured(lane: Lane, reference: Reference, artifact: Artifact, bench: Bench) -> Measurement:
    """What the file does, in the runtime that will run it.

    Raises:
        CompressError: the runtime cannot run it, or the file changed meanwhile.
    """
    runtime = runtime_of(artifact.runtime, bench.runtime)
    determined_by = (
        artifact.sha256,
        dict(runtime.environment()),
        bench.splits.holdout.sha256,
        bench.trigger_digests,
        digests.of_arrays(reference.logits.numpy(), reference.subject_predictions.numpy()),
    )
    known = bench.ledger.find(Measurement, *determined_by)
    if known is None:
        known = measure(
            runtime.open(artifact.path),
            bench.splits.holdout,
            bench.triggers,
            reference,
            lane=lane,
            setting=artifact.setting,
            progress=bench.progress,
        )
        if digests.of_file(artifact.path) != artifact.sha256:
            raise CompressError("the file changed while it was measured")
        bench.ledger.enter(known, *determined_by)
    return replace(known, lane=lane, setting=artifact.setting)


def _written(
    lined: Lined, setting: Setting, steps: Sequence[Compressor], form: Format, bench: Bench
) -> Written:
    determined_by = (
        lined.identity,
        [{"kind": step.kind, **step.model_dump()} for step in steps],
        setting.format,
        bench.splits.calibration.sha256,
        bench.seed,
    )
    known = bench.ledger.find(Written, *determined_by)
    if known is not None and _intact(known.path, known.sha256):
        return known
    model, changes = copy.deepcopy(lined.model), []
    example = bench.splits.calibration.floats(slice(0, 2))
    counted = costs.weights_and_macs(model, example[:1])
    for step in steps:
        if not isinstance(step, ModuleStep):
            raise CompressError(f"{step.kind} is neither a step on the module nor on the file")
        model, change = step.on_module(model, _context(lined, bench))
        changes.append(change)
        # What a quantizer has rewritten holds no layers to count, and as many weights as before.
        counted = costs.weights_and_macs(model, example[:1]) or counted
    path = bench.folder / f"{digests.of_json(determined_by)[:16]}{form.suffix}"
    form.write(model.eval(), example, path)
    made = Written(path, digests.of_file(path), tuple(changes), *(counted or (None, None)))
    return bench.ledger.enter(made, *determined_by)


def _context(lined: Lined, bench: Bench) -> Context:
    again = None if lined.purification is None else partial(_again, lined, lined.purification, bench)
    return Context(lined.head, bench.splits.calibration, lined.model, bench.seed, bench.progress, again)


def _again(lined: Lined, done: Purification, bench: Bench, model: nn.Module) -> nn.Module:
    purifier = registry.build(Purifier, "purifiers", {"kind": done.kind, **done.parameters})
    return class_after_class(
        purifier, model, lined.head, done.target_classes, bench.splits.fit, bench.seed, bench.progress
    ).model


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and digests.of_file(path) == sha256
