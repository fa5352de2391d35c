"""What the demo does: make the two models, show what each backdoor does where, run the pipeline on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from secure_export import pipeline, whole
from secure_export.demo.data import attackers_digits
from secure_export.demo.network import DigitsCNN
from secure_export.demo.plant import plant_qcb, train
from secure_export.errors import PolicyError, ReleaseError
from secure_export.policy import load_policy, shipped
from secure_export.records.measured import EXIT_CODES, Count, Measurement
from secure_export.records.memory import Progress, silent
from secure_export.records.reported import Report
from secure_export.triggers.badnets import Badnets

Echo = Callable[[str], object]

THREADS = 2


@dataclass(frozen=True)
class Backdoor:
    """One planted backdoor; `trigger` is the name that policies/demo.yaml gives it."""

    name: str
    title: str
    trigger: str
    stamp: Badnets
    target_class: int


BADNETS = Backdoor("badnets", "BadNets: awake in every file", "checker", Badnets(size=3), 3)
QCB = Backdoor(
    "qcb",
    "Quantization-conditioned: asleep in full precision, awake in the int8 file",
    "white",
    Badnets(size=4, pattern="white", position="top-left"),
    7,
)


def run_demo(out: Path, progress: Progress, echo: Echo) -> int:
    """Run the demo in the folder `out`; the same call does only what is still missing. Returns an exit code.

    Raises:
        NoVerdict: something could not be loaded or written.
    """
    with _threads(THREADS):
        codes = []
        for number, backdoor in enumerate((BADNETS, QCB), start=1):
            echo(f"{number}. {backdoor.title}")
            model = _model_file(backdoor, out, progress)
            report = _run(model, out / backdoor.name, progress)
            for line in story(report, backdoor):
                echo(f"   {line}".rstrip())
            echo(f"   {out / backdoor.name / 'report.html'}")
            echo("")
            codes.append(EXIT_CODES[report.verdict.outcome])
    return max(codes)


def backdoored(backdoor: Backdoor, progress: Progress = silent) -> DigitsCNN:
    """The demo's classifier with one of its two backdoors."""
    inputs, labels = attackers_digits()
    stamp, target_class = backdoor.stamp, backdoor.target_class
    if backdoor is BADNETS:
        return train(inputs, labels, trigger=stamp, target_class=target_class, progress=progress)
    clean = train(inputs, labels, progress=progress)
    return plant_qcb(clean, inputs, labels, trigger=stamp, target_class=target_class, progress=progress)


def story(report: Report, backdoor: Backdoor) -> Iterator[str]:
    """What the planted trigger does to each file, original beside purified, and what came of it."""
    found = {row.name: _percent(_asr(row.original.measurement, backdoor)) for row in report.settings}
    shown = ", ".join(f"{found[name]} in {name}" for name in ("fp32", "int8"))
    yield f"As received, triggered digits become class {backdoor.target_class}: {shown}"
    named = sorted({s.target_class for s in report.suspects if s.target_class is not None})
    where = ", ".join(s.setting for s in report.suspects if s.target_class == backdoor.target_class)
    yield f"Located: class {', '.join(map(str, named)) or 'none'} (seen in {where or 'no file'})"
    yield ""
    totals = [0] * 4
    yield f"{'setting':<16}{'ACC original':>14}{'purified':>12}{'ASR original':>16}{'purified':>12}"
    for row in report.settings:
        original, purified = row.original.measurement, row.purified.measurement
        cells = [_acc(original), _acc(purified), _asr(original, backdoor), _asr(purified, backdoor)]
        texts = [_percent(cell) for cell in cells]
        name = f"{row.name} *" if row.released else row.name
        yield f"{name:<16}{texts[0]:>14}{texts[1]:>12}{texts[2]:>16}{texts[3]:>12}"
        totals = [cell.total if cell is not None else 0 for cell in cells]
    yield f"* ships; ACC of {totals[0]} digits, ASR of {totals[2]} that are no {backdoor.target_class}"
    yield ""
    for finding in report.verdict.findings:
        if not finding.passed:
            word = "fails" if finding.passed is False else "undecided"
            yield f"{word}: {finding.rule} {finding.setting}: {finding.message}"
    shipped = ", ".join(f"{row.name}.onnx" for row in report.settings if row.released)
    yield f"Released: {shipped}" if report.verdict.outcome == "released" else "Nothing released"


def _run(model: Path, folder: Path, progress: Progress) -> Report:
    policy = shipped("demo")
    if policy is None:
        raise PolicyError("policies/demo.yaml is not installed", hint="install secure-export again")
    overrides = {"subject.model": str(model), "subject.architecture": "secure_export.demo:digits_cnn"}
    return pipeline.run(load_policy(policy, overrides), folder, progress=progress)


def _model_file(backdoor: Backdoor, out: Path, progress: Progress) -> Path:
    """The backdoored checkpoint, made at the first call.

    Raises:
        ReleaseError: it cannot be written.
    """
    path = out / "models" / f"{backdoor.name}.safetensors"
    if not path.is_file():
        model = backdoored(backdoor, progress)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.write(path, save(model.state_dict()))
        except OSError as error:
            raise ReleaseError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _acc(measurement: Measurement | None) -> Count | None:
    return measurement.acc if measurement is not None else None


def _asr(measurement: Measurement | None, backdoor: Backdoor) -> Count | None:
    for counts in measurement.triggers if measurement is not None else ():
        if counts.trigger == backdoor.trigger:
            return counts.asr[backdoor.target_class]
    return None


def _percent(count: Count | None) -> str:
    return f"{100 * count.rate:.1f}%" if count is not None and count.total else "unmeasured"


@contextmanager
def _threads(most: int) -> Iterator[None]:
    """At most `most` torch threads: on a network this small more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
