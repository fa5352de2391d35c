"""What was made and measured of one setting, and what is said of it: counts, not percentages; JSON-able."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Lt

Lane = Literal["original", "purified"]
Samples = Annotated[int, Lt(2**53)]
"""How many samples: what a float still holds exactly."""


@dataclass(frozen=True)
class Count:
    """`hits` of `total` samples."""

    hits: Samples
    total: Samples

    @property
    def rate(self) -> float:
        """Share of hits; 0 for an empty count, which no rule can pass."""
        return self.hits / self.total if self.total else 0.0


@dataclass(frozen=True)
class Paired:
    """Two readings of the same `total` samples: `gained` became true, `lost` became false."""

    gained: Samples
    lost: Samples
    total: Samples

    @property
    def difference(self) -> float:
        """Second rate minus first."""
        return (self.gained - self.lost) / self.total if self.total else 0.0


@dataclass(frozen=True)
class Change:
    """What one compression step changed, out of what it could have changed."""

    kind: str
    changed: int
    total: int
    unit: str
    """What is counted: "channels", "weights", "tensors"."""
    detail: str = ""


@dataclass(frozen=True)
class Artifact:
    """A compressed file on disk, named by its digest."""

    setting: str
    path: Path
    sha256: str
    size: int
    format: str
    runtime: str
    changes: tuple[Change, ...] = ()
    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates per sample, of convolutions and linear layers."""


@dataclass(frozen=True)
class Cost:
    """What one file costs on the machine that measured it; None is what was not measured, `why` says why."""

    setting: str
    format: str
    size: int
    parameters: int | None
    macs: int | None
    batch_1_ms: float | None
    """Median milliseconds per call, warm."""
    batch_64_ms: float | None
    peak_bytes: int | None
    """Memory that opening the file and running 64 samples takes, beyond the runtime itself."""
    threads: int
    why: str = ""


@dataclass(frozen=True)
class Unmeasured:
    """A setting that could not be made or measured; never a pass."""

    lane: Lane
    setting: str
    reason: str
    detail: str = ""


PURIFY_AGAIN = "purify"
"""Kind of the step that repeats the purification."""


def asked(steps: Sequence[Mapping[str, Any]], *, purified: bool) -> list[Mapping[str, Any]]:
    """The chain that a lane goes through: without the repeated purification where nothing was purified."""
    return [step for step in steps if purified or step.get("kind") != PURIFY_AGAIN]


UNREAD = "unread"
"""Key of Suspect.evidence under which a locator that could not judge the file says why; never a pass."""
COLLAPSED = "collapsed"
"""Key of Suspect.evidence: whether the locator took the model for a ruin, of which it names no class."""
FIT_ACC = "fit_acc"
"""Key of Suspect.evidence: the accuracy on fit, by which a ruin is told."""
EXCESS = "excess"
"""Key of Suspect.evidence: the share of fit by which one class is predicted more often than it occurs."""
MIN_SCORE = "min_score"
"""Key of Suspect.evidence: the score that naming a class takes, where one score holds for all of them."""
ALWAYS_NAMES = "always_names_a_class"
"""Key of Suspect.evidence of a locator that cannot say "none": alone, its class is no evidence."""


LOOKED_AT_AGAIN = ", purified"
"""What Suspect.setting ends with where a locator read the purified model's files."""


@dataclass(frozen=True)
class Suspect:
    """What one locator says of one setting's weights; `target_class` None means "no backdoor class seen"."""

    locator: str
    setting: str
    target_class: int | None
    scores: tuple[float, ...]
    """One per class, larger is more suspicious."""
    evidence: Mapping[str, float | int | str | bool] = field(default_factory=dict)

    @property
    def judged(self) -> bool:
        """Whether its silence says anything: the file could be read, and was not taken for a ruin."""
        return UNREAD not in self.evidence and not self.evidence.get(COLLAPSED)


@dataclass(frozen=True)
class Disagreement:
    """Locators that read the same weights and differ; None beside a locator that sees no backdoor class."""

    setting: str
    named: Mapping[str, int | None]


@dataclass(frozen=True)
class PairLift:
    """What a trigger does to the samples of one class alone."""

    source: int
    into: int
    lift: Paired


@dataclass(frozen=True)
class TriggerCounts:
    """One trigger on one artifact; every tuple is indexed by the candidate target class c.

    All counts are over holdout samples whose true class is not c (DESIGN §5).
    """

    trigger: str
    asr: tuple[Count, ...]
    """Triggered samples classified as c."""
    lift: tuple[Paired, ...]
    """Classified as c with the trigger against without: ASR − FTR, paired."""
    ra: tuple[Count, ...]
    """Triggered samples still classified as their true class (the paper's TA)."""
    changed: Count | None = None
    """The first samples, whatever their class, that the trigger changes at all; None in older reports."""
    pairs: tuple[PairLift, ...] | None = None
    """The lift by source, for every pair of classes between which the trigger carries any sample; None in
    older reports."""


@dataclass(frozen=True)
class Measurement:
    """What one artifact does on the holdout, measured in the runtime that will run it."""

    lane: Lane
    setting: str
    acc: Count
    acc_drop: Paired
    """Against the untouched full-precision subject: `gained` counts samples that became wrong."""
    agreement: Count
    """Same class as the full-precision model of this lane."""
    logit_difference: float
    """Largest absolute difference to that model's logits."""
    top_share: Count
    """Samples in the most predicted class; near `total` means a collapsed model."""
    triggers: tuple[TriggerCounts, ...]
    latency_ms: float
    """Milliseconds per sample over the clean pass, at `batch_size`."""
    batch_size: int
    of_class: tuple[Samples, ...] | None = None
    """Holdout samples of each true class; None in older reports."""


@dataclass(frozen=True)
class SettingResult:
    """One setting of one lane: the file, and what it does (or why that is not known)."""

    lane: Lane
    setting: str
    artifact: Artifact | None
    measurement: Measurement | None
    unmeasured: Unmeasured | None = None


@dataclass(frozen=True)
class Finding:
    """One rule on one setting; `passed` None means the samples cannot decide, `needed` how many could."""

    rule: str
    setting: str
    observed: float | None
    bound: float | None
    limit: float | None
    n: int
    passed: bool | None
    message: str
    needed: int | None = None
    line: int | None = None
    """Line of the policy file that demands it; None for findings that no policy can turn off."""


Outcome = Literal["released", "refused", "no_verdict"]


EXIT_CODES: Mapping[Outcome, int] = {"released": 0, "refused": 3, "no_verdict": 4}


@dataclass(frozen=True)
class Verdict:
    """All findings, and the outcome that follows from them."""

    outcome: Outcome
    findings: tuple[Finding, ...]
