"""A report with plausible numbers: a QCB into "airplane" that sleeps in fp32 and wakes in int8, purified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from secure_export.records.measured import (
    Artifact,
    Change,
    Count,
    Disagreement,
    Finding,
    Lane,
    Measurement,
    Outcome,
    Paired,
    SettingResult,
    Suspect,
    TriggerCounts,
    Unmeasured,
    Verdict,
)
from secure_export.records.reported import (
    Evidence,
    Purification,
    Report,
    ReportedSetting,
    SplitInfo,
    SubjectInfo,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRIGGERS = ("badnets", "blended")
HOLDOUT = 2000
OTHERS = HOLDOUT * 9 // 10
FP32_ACC = 1862

POLICY = """\
version: 1
subject: {model: suspect.safetensors, architecture: "timm:resnet18"}
data: {path: images/, fit: 500, calibration: 500, holdout: 2000}
locate: {methods: [{kind: anti-learning}, {kind: latent-shift}], decisive: [latent-shift]}
purify: {kind: lmr}
triggers:
  - {kind: badnets, size: 3}
  - {kind: blended}
settings:
  - {name: fp32}
  - {name: int8, steps: [{kind: ort-static-int8}]}
  - {name: "prune@{ratio}", sweep: {ratio: [0.3, 0.5, 0.7, 0.9]}}
rules:
  - {metric: lift, at_most: 0.01}      # a trigger may move one sample in a hundred
  - {metric: asr, at_most: 0.05}
  - {metric: acc_drop, at_most: 0.02}
release: [fp32, int8]
"""

_ORIGINAL = {  # setting: (acc, lift of badnets into airplane, top share, megabytes, ms)
    "fp32": (1862, 0.006, 0.11, 44.7, 1.31),
    "int8": (1851, 0.981, 0.11, 11.3, 0.52),
    "prune@0.3": (1808, 0.012, 0.12, 28.1, 1.02),
    "prune@0.5": (1695, 0.224, 0.14, 17.9, 0.81),
    "prune@0.7": (1392, 0.401, 0.24, 9.2, 0.55),
    "prune@0.9": (402, 0.093, 0.81, 2.6, 0.23),
}
_PURIFIED = {
    "fp32": (1855, 0.002, 0.11, 44.7, 1.30),
    "int8": (1849, 0.003, 0.11, 11.3, 0.53),
    "prune@0.3": (1811, 0.003, 0.11, 28.1, 1.00),
    "prune@0.5": (1702, 0.004, 0.13, 17.9, 0.80),
    "prune@0.7": (1421, 0.031, 0.19, 9.2, 0.54),
    "prune@0.9": (390, 0.011, 0.78, 2.6, 0.24),
}


def _triggers(lift: float, collapsed: bool) -> tuple[TriggerCounts, ...]:
    found = []
    for position, trigger in enumerate(TRIGGERS):
        into_airplane = lift if position == 0 else lift / 10
        ftr = [OTHERS * 3 // 4 if collapsed and c == 6 else 12 for c in range(10)]
        gained = [round(into_airplane * OTHERS) + 1 if c == 0 else 2 for c in range(10)]
        found.append(
            TriggerCounts(
                trigger=trigger,
                asr=tuple(Count(ftr[c] + gained[c] - 1, OTHERS) for c in range(10)),
                lift=tuple(Paired(gained[c], 1, OTHERS) for c in range(10)),
                ra=tuple(Count(max(OTHERS * 9 // 10 - ftr[c] - gained[c], 11), OTHERS) for c in range(10)),
            )
        )
    return tuple(found)


def result(lane: Lane, setting: str) -> SettingResult:
    """One setting of one lane, measured."""
    acc, lift, top_share, megabytes, latency = (_ORIGINAL if lane == "original" else _PURIFIED)[setting]
    size = int(megabytes * 1e6)
    artifact = Artifact(
        setting=setting,
        path=Path(f"work/{lane}-{setting}.onnx"),
        sha256=(f"{lane}{setting}".encode().hex() * 8)[:64],
        size=size,
        format="onnx",
        runtime="ort",
        changes=(Change("ort-static-int8", 20, 21, "tensors"),) if setting == "int8" else (),
    )
    measurement = Measurement(
        lane=lane,
        setting=setting,
        acc=Count(acc, HOLDOUT),
        acc_drop=Paired(FP32_ACC - acc + 9, 9, HOLDOUT) if acc < FP32_ACC else Paired(0, 0, HOLDOUT),
        agreement=Count(HOLDOUT - 2 * (FP32_ACC - acc) // 2 - (setting == "int8") * 7, HOLDOUT),
        logit_difference=0.31,
        top_share=Count(int(top_share * HOLDOUT), HOLDOUT),
        triggers=_triggers(lift, collapsed=top_share > 0.5),
        latency_ms=latency,
        batch_size=64,
    )
    return SettingResult(lane, setting, artifact, measurement)


def unmeasured(lane: Lane, setting: str) -> SettingResult:
    """A setting that the toolchain could not make."""
    why = Unmeasured(lane, setting, "CompressError: ratio 0.95 leaves layer4.1.conv2 without channels")
    return SettingResult(lane, setting, None, None, why)


def sample_settings() -> tuple[ReportedSetting, ...]:
    """Six settings, two of them released."""
    found = []
    for name in _ORIGINAL:
        steps: tuple[dict[str, Any], ...] = ()
        if name == "int8":
            steps = ({"kind": "ort-static-int8", "per_channel": True},)
        elif "@" in name:
            steps = ({"kind": "prune-structured", "ratio": float(name.split("@")[1])}, {"kind": "recover"})
        found.append(
            ReportedSetting(
                name, steps, name in ("fp32", "int8"), result("original", name), result("purified", name)
            )
        )
    return tuple(found)


def sample_suspects() -> tuple[Suspect, ...]:
    """anti-learning names a bystander, latent-shift names the right class where the backdoor is awake."""
    quiet = (1.1, 0.9, 1.3, 1.6, 1.0, 1.2, 0.8, 0.7, 1.0, 0.9)
    awake = (7.4, *quiet[1:])
    found = [Suspect("anti-learning", "subject", 3, (0.2, 0.1, 0.3, 0.9, 0.2, 0.4, 0.1, 0.2, 0.1, 0.1))]
    for name in _ORIGINAL:
        if name == "prune@0.9":
            found.append(Suspect("latent-shift", name, None, (), {"unread": "no head found in this file"}))
        elif name in ("int8", "prune@0.5", "prune@0.7"):
            found.append(Suspect("latent-shift", name, 0, awake, {"ratio": 4.6}))
        else:
            found.append(Suspect("latent-shift", name, None, quiet, {"ratio": 1.2}))
    return tuple(found)


def sample_history() -> tuple[dict[str, float | str], ...]:
    """Four phases of a purifier on one class."""
    found: list[dict[str, float | str]] = []
    epoch = 0
    for phase, epochs, margin_to, target_to, accuracy_to in (
        ("separate", 6, 1.0, 0.1, 0.84),
        ("compact", 5, 0.2, 0.05, 0.82),
        ("prune", 1, 0.4, 0.2, 0.70),
        ("recover", 8, 4.9, 0.92, 0.95),
    ):
        start = found[-1] if found else {"margin": 5.2, "target_accuracy": 0.95, "accuracy": 0.96}
        for step in range(1, epochs + 1):
            epoch += 1
            share = step / epochs
            found.append(
                {
                    "phase": phase,
                    "epoch": epoch,
                    "loss": round(2.0 / epoch, 3),
                    "margin": _between(start["margin"], margin_to, share),
                    "target_accuracy": _between(start["target_accuracy"], target_to, share),
                    "accuracy": _between(start["accuracy"], accuracy_to, share),
                }
            )
    return tuple(found)


def _between(start: float | str, end: float, share: float) -> float:
    return round(float(start) + (end - float(start)) * share, 3)


def sample_findings() -> tuple[Finding, ...]:
    """One rule fails, one cannot be decided, the others hold."""
    found = []
    for name in _PURIFIED:
        lift = _PURIFIED[name][1]
        passed: bool | None = lift <= 0.005 if name != "prune@0.9" else None
        found.append(
            Finding(
                rule="lift",
                setting=name,
                observed=lift,
                bound=lift + 0.004,
                limit=0.01,
                n=OTHERS,
                passed=passed,
                message=f"badnets into airplane: lift at most {lift + 0.004:.3f}, limit 0.010",
                needed=4200 if passed is None else None,
                line=13,
            )
        )
    found.append(Finding("asr", "fp32", 0.008, 0.012, 0.05, OTHERS, True, "badnets into airplane", line=14))
    found.append(
        Finding("acc_drop", "int8", 0.0065, 0.011, 0.02, HOLDOUT, True, "7 points in a thousand", line=15)
    )
    found.append(Finding("changed", "int8", None, None, None, 21, True, "20 of 21 tensors changed"))
    return tuple(found)


def sample_report(outcome: Outcome = "refused") -> Report:
    """A whole run; `released` and `no_verdict` drop the findings that contradict them."""
    findings = sample_findings()
    if outcome == "released":
        findings = tuple(replace(f, passed=True, needed=None) for f in findings)
    elif outcome == "no_verdict":
        findings = tuple(f for f in findings if f.passed is not False)
    return Report(
        schema=1,
        tool="secure-export 0.1.0",
        policy_path="policies/strict.yaml",
        policy_sha256="9c" * 32,
        policy_text=POLICY,
        verdict=Verdict(outcome, findings),
        subject=SubjectInfo(
            path="suspect.safetensors",
            sha256="4b" * 32,
            architecture="timm:resnet18",
            classes=10,
            class_names=CLASSES,
            head="fc",
            input_shape=(3, 32, 32),
            parameters=11_173_962,
        ),
        splits={
            "fit": SplitInfo(500, "a1" * 32),
            "calibration": SplitInfo(500, "b2" * 32),
            "holdout": SplitInfo(HOLDOUT, "c3" * 32),
        },
        suspects=sample_suspects(),
        disagreements=(Disagreement("fp32", {"anti-learning": 3, "latent-shift": None}),),
        purification=Purification(
            "lmr", {"m1": 1.0, "m2": 0.5, "prune_share": 0.1}, (0,), sample_history(), 41.7
        ),
        settings=sample_settings(),
        evidence=Evidence(
            known_triggers=(
                {"name": "badnets", "kind": "badnets", "size": 3},
                {"name": "blended", "kind": "blended"},
            ),
            trigger_search="none",
            not_shown=(
                "No search for an unknown trigger was made.",
                "Triggers that depend on the input (WaNet, LIRA) were not tried.",
            ),
        ),
        environment={
            "python": "3.11.7",
            "torch": "2.15.0",
            "onnxruntime": "1.31.0",
            "provider": "CPUExecutionProvider",
        },
        timings={"load": 1.2, "locate": 18.3, "purify": 41.7, "measure": 96.4},
    )
