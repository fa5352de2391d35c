"""A policy and a report of plain numbers, to test the judge: three classes, two triggers, two settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from secure_export.policy import Policy, parse_policy
from secure_export.records.measured import (
    Artifact,
    Change,
    Count,
    Finding,
    Lane,
    Measurement,
    Paired,
    SettingResult,
    Suspect,
    TriggerCounts,
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

CLASSES, HOLDOUT = 3, 1500
TRIGGERS = ({"name": "patch", "kind": "badnets", "size": 3}, {"name": "wave", "kind": "sig"})
STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "fp32": (),
    "int8": ({"kind": "ort-static-int8", "per_channel": True},),
}
RULES: tuple[dict[str, Any], ...] = (
    {"metric": "acc_drop", "at_most": 0.03, "settings": "released"},
    {"metric": "asr", "at_most": 0.05},
    {"metric": "lift", "at_most": 0.05},
)


def make_policy(**changes: Any) -> Policy:
    """The policy that judges make_report(); `changes` replace whole sections."""
    sections: dict[str, Any] = {
        "version": 1,
        "locate": {
            "methods": [{"kind": "anti-learning"}, {"kind": "latent-shift"}],
            "decisive": ["latent-shift"],
            "unconfirmed": "accept",
        },
        "purify": {"kind": "lmr"},
        "settings": [{"name": name, "steps": list(steps)} for name, steps in STEPS.items()],
        "release": ["fp32"],
        "triggers": list(TRIGGERS),
        "rules": list(RULES),
    }
    return parse_policy(yaml.dump(sections | changes, Dumper=NoAliases, sort_keys=False), "test.yaml")


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def make_measurement(setting: str, lane: Lane = "purified", **changes: Any) -> Measurement:
    """Numbers under which every rule of RULES holds."""
    n = HOLDOUT * 2 // 3
    counts = tuple(
        TriggerCounts(
            trigger=trigger["name"],
            asr=(Count(5, n),) * CLASSES,
            lift=(Paired(4, 2, n),) * CLASSES,
            ra=(Count(950, n),) * CLASSES,
        )
        for trigger in TRIGGERS
    )
    numbers: dict[str, Any] = {
        "acc": Count(1400, HOLDOUT),
        "acc_drop": Paired(20, 10, HOLDOUT),
        "agreement": Count(1480, HOLDOUT),
        "logit_difference": 0.2,
        "top_share": Count(520, HOLDOUT),
        "triggers": counts,
        "latency_ms": 1.0,
        "batch_size": 64,
    }
    return Measurement(lane=lane, setting=setting, **(numbers | changes))


def with_counts(
    trigger: str, metric: str, target_class: int, value: Count | Paired
) -> tuple[TriggerCounts, ...]:
    """The triggers of make_measurement() with one count replaced."""
    found = []
    for counts in make_measurement("fp32").triggers:
        if counts.trigger == trigger:
            per_class = list(getattr(counts, metric))
            per_class[target_class] = value
            counts = replace(counts, **{metric: tuple(per_class)})
        found.append(counts)
    return tuple(found)


def make_result(
    setting: str, lane: Lane = "purified", measurement: Measurement | None = None
) -> SettingResult:
    """A measured file; each step changed something."""
    changes = tuple(Change(str(step["kind"]), 20, 21, "tensors") for step in STEPS[setting])
    digest = (lane + setting).encode().hex().ljust(64, "0")
    artifact = Artifact(setting, Path(f"{setting}.onnx"), digest, 1000, "onnx", "onnxruntime", changes)
    return SettingResult(lane, setting, artifact, measurement or make_measurement(setting, lane))


def make_setting(setting: str, purified: SettingResult | None = None) -> ReportedSetting:
    """Both lanes of one setting."""
    return ReportedSetting(
        setting,
        STEPS[setting],
        setting == "fp32",
        make_result(setting, "original"),
        purified or make_result(setting),
    )


def make_report(*settings: ReportedSetting, **changes: Any) -> Report:
    """A report that make_policy() releases; class 1 was found by both locators and purified."""
    report = Report(
        schema=1,
        tool="secure-export test",
        policy_path="test.yaml",
        policy_sha256="0" * 64,
        policy_text="",
        verdict=Verdict("no_verdict", ()),
        subject=SubjectInfo(
            "m.safetensors", "a" * 64, "timm:x", CLASSES, ("a", "b", "c"), "fc", (3, 8, 8), 100
        ),
        splits={"holdout": SplitInfo(HOLDOUT, "c" * 64)},
        suspects=(
            Suspect("anti-learning", "subject", 1, (0.1, 0.8, 0.1)),
            Suspect("latent-shift", "fp32", 1, (0.1, 0.8, 0.1)),
            Suspect("latent-shift", "int8", None, (0.1, 0.2, 0.1)),
        ),
        purification=Purification("lmr", {}, (1,), (), 1.0),
        settings=settings or (make_setting("fp32"), make_setting("int8")),
        evidence=Evidence(TRIGGERS, "none", ()),
        environment={},
        timings={},
    )
    return replace(report, **changes)


def measured(setting: str = "fp32", **numbers: Any) -> Report:
    """make_report() with some numbers of one setting's purified lane replaced."""
    changed = make_setting(setting, make_result(setting, measurement=make_measurement(setting, **numbers)))
    return make_report(*(changed if name == setting else make_setting(name) for name in STEPS))


def first(findings: tuple[Finding, ...], rule: str, setting: str) -> Finding:
    """The finding of the first rule of that name on this setting."""
    return next(finding for finding in findings if (finding.rule, finding.setting) == (rule, setting))


def only(findings: tuple[Finding, ...], rule: str, setting: str) -> Finding:
    """The one finding of this rule on this setting."""
    (found,) = [finding for finding in findings if (finding.rule, finding.setting) == (rule, setting)]
    return found
