"""A policy may name several purifiers: each is tried, the first that holds on the calibration split is kept.

Neither a known trigger nor the holdout is read. Every setting's own file is measured on calibration samples:
rules for accuracy are read as they are, those for ASR and lift against triggers that were searched on fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from secure_export import digests
from secure_export.lane import Bench, at_the_head, made, through_settings
from secure_export.perturbations import FEWEST_POSITIONS, Perturbation
from secure_export.policy import Policy, TriggerSpec, judge
from secure_export.purifiers import _inversion, _views
from secure_export.purifiers._inversion import Family, Logits
from secure_export.records.measured import SettingResult, Verdict
from secure_export.records.memory import Split, Subject
from secure_export.records.reported import Evidence, Purification, Report, ReportedSetting, SubjectInfo
from secure_export.triggers import Trigger

if TYPE_CHECKING:
    from torch import Tensor, nn

FAMILIES: Mapping[Family, float] = {"patch": 0.012, "l2": 0.022}
"""Size of a searched trigger: share of the pixels, and root mean square; 12 pixels and 1.2 on 3x32x32."""
STEPS, BATCH, RESTARTS = 60, 64, 2
SELDOM = ("ra",)
"""Metrics of known triggers that say nothing of a searched one, which may cover what the sample shows."""


class Searched(Trigger):
    """A perturbation that was found by search, as a trigger."""

    keep: torch.Tensor
    add: torch.Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """`inputs` with the perturbation, in [0, 1]."""
        which = torch.zeros(len(inputs), dtype=torch.long)
        return Perturbation(self.keep, self.add).stamp(inputs, which)


@dataclass(frozen=True)
class Rehearsal:
    """What a candidate is tried on before the holdout sees the one that is kept."""

    policy: Policy
    subject: Subject
    targets: tuple[int, ...]
    bench: Bench

    @cached_property
    def triggers(self) -> Mapping[str, Searched]:
        """By name: perturbations that carry fit samples into a target class of the *original* model.

        Replaying them tells a removed backdoor from one that the purifier merely hides from a search.
        """
        found = {}
        for target in self.targets:
            for name, logits in (("fp32", self.subject.model), ("int8", rounded(self.subject.model))):
                for family, size in FAMILIES.items():
                    if _inversion.applicable(family, self.bench.splits.fit.inputs):
                        trigger = search(logits, self.bench.splits.fit, target, family, size, self.bench.seed)
                        found[f"{family}-{name}-{target}"] = trigger
        return found

    def broken(self, model: nn.Module, identity: str, purification: Purification) -> tuple[str, ...]:
        """What the calibration split says against a candidate; empty when nothing does."""
        bench = self._bench(self.triggers)
        subject = self.subject
        original = at_the_head(subject.model, subject.head, "original", subject.identity, bench)
        purified = at_the_head(
            model, self.subject.head, "purified", identity, bench, original.reference, purification
        )
        results = through_settings(purified, self.policy.expanded_settings(), bench)
        policy = self.rehearsed()
        findings = judge(policy, report(policy, self.subject, purification, results)).findings
        # Undecided is no reason to go on: the calibration split is small, and the holdout still decides.
        return tuple(
            f"{f.setting}: {f.message}" for f in findings if f.passed is False or f.rule == "unmeasured"
        )

    def files(
        self, model: nn.Module, identity: str, purification: Purification | None
    ) -> list[SettingResult]:
        """The candidate's file in every setting, unmeasured."""
        bench = self._bench({})
        lined = at_the_head(model, self.subject.head, "purified", identity, bench, purification=purification)
        return made(lined, self.policy.expanded_settings(), bench)

    def rehearsed(self) -> Policy:
        """The policy with the searched triggers in the place of the known ones."""
        specs = tuple(
            TriggerSpec.model_validate({"name": name, "kind": "searched"}) for name in self.triggers
        )
        rules = tuple(
            rule.model_copy(update={"triggers": "all"})
            for rule in self.policy.rules
            if rule.metric not in SELDOM
        )
        return self.policy.model_copy(update={"triggers": specs, "rules": rules, "evidence": None})

    def _bench(self, triggers: Mapping[str, Searched]) -> Bench:
        """The bench without the holdout and the known triggers."""
        return replace(
            self.bench,
            splits=replace(self.bench.splits, holdout=self.bench.splits.calibration),
            triggers=triggers,
            trigger_digests={
                name: digests.of_arrays(trigger.keep.numpy(), trigger.add.numpy())
                for name, trigger in triggers.items()
            },
        )


@torch.no_grad()
def rounded(model: nn.Module) -> Logits:
    """The model with its weights rounded to 8 bits, where a quantization-conditioned backdoor is awake."""
    weights = _views.int8_weights(model)
    return lambda inputs: functional_call(model, weights, (inputs,))


def search(logits: Logits, fit: Split, target: int, family: Family, size: float, seed: int) -> Searched:
    """The most successful of a few universal perturbations of `fit` into `target`."""
    others = fit.floats()[fit.labels != target]
    shape = others.shape[1:]
    pixels = shape[1:].numel()
    budget = max(FEWEST_POSITIONS, size * pixels) if family == "patch" else size * shape.numel() ** 0.5
    found = _inversion.universal(
        [logits],
        others,
        target,
        family,
        torch.full((RESTARTS,), budget),
        steps=STEPS,
        batch=BATCH,
        generator=torch.Generator().manual_seed(seed),
    )
    best = int(_inversion.success(logits, others, target, found).argmax())
    return Searched(keep=found.keep[best : best + 1], add=found.add[best : best + 1])


def report(
    policy: Policy, subject: Subject, purification: Purification, results: Sequence[SettingResult]
) -> Report:
    """As much of a report as the rules read."""
    settings = tuple(
        ReportedSetting(
            setting.name,
            setting.steps,
            setting.released,
            SettingResult("original", setting.name, None, None),
            result,
        )
        for setting, result in zip(policy.expanded_settings(), results, strict=True)
    )
    known = tuple({"name": spec.name, **spec.plugin} for spec in policy.triggers)
    return Report(
        schema=0,
        tool="",
        policy_path="",
        policy_sha256="",
        policy_text="",
        verdict=Verdict("no_verdict", ()),
        subject=SubjectInfo("", "", "", subject.classes, (), subject.head, subject.input_shape, 0),
        splits={},
        suspects=(),
        purification=purification,
        settings=settings,
        evidence=Evidence(known, "", ()),
        environment={},
        timings={},
    )
