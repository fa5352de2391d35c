"""What flows between the stages: frozen values, counts instead of percentages.

The records below `Measured data` hold only JSON-able fields, so a stored report can be judged again on a
machine without torch; those above hold tensors and live in memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Predictor = Callable[["Tensor"], "Tensor"]
"""Raw inputs [N, ...] in [0, 1] to logits [N, classes], float32 on the CPU."""

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); the command line turns it into a bar with the time left."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress of callers that want none."""


# ---- In memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputSpec:
    """The raw input space that data, triggers, files and runtimes share: [0, 1], without the batch axis."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """The model under test: eval mode, normalization inside, raw inputs to logits."""

    model: nn.Module
    input_spec: InputSpec
    classes: int
    head: str
    """Qualified name, inside `model`, of the Linear or 1x1 Conv2d that produces the logits."""
    sha256: str
    """Of the checkpoint file, taken before it was opened."""
    architecture: str
    source: Path


@dataclass(frozen=True)
class Split:
    """Clean labelled samples. `inputs` is uint8 (0..255) or float32 ([0, 1]), [N, ...]; labels int64 [N]."""

    inputs: Tensor
    labels: Tensor
    sha256: str

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def floats(self, index: Any = slice(None)) -> Tensor:
        """Inputs at `index` as float32 in [0, 1], which is what every model and trigger takes."""
        chosen = self.inputs[index]
        return chosen if chosen.is_floating_point() else chosen.float().div_(255)


@dataclass(frozen=True)
class Splits:
    """Disjoint: defences see `fit`, compression sees `calibration`, only measuring sees `holdout`."""

    fit: Split
    calibration: Split
    holdout: Split
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """What a locator may look at: the last hidden layer and the head of one setting's weights.

    logits = latents(inputs) @ weight.T + bias. `module` is a trainable copy (None where only a file exists)
    and `head` the qualified name of its head. `twin` gives logits with gradients to the inputs (None where a
    file has no differentiable twin).
    """

    setting: str
    latents: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor
    module: nn.Module | None = None
    head: str | None = None
    twin: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Purified:
    """A purifier's model and, per epoch, what the figures need: phase, loss, margins, accuracy on fit."""

    model: nn.Module
    history: tuple[Mapping[str, float | int | str], ...]


# ---- Measured data (JSON-able) --------------------------------------------------------------------------

Lane = Literal["original", "purified"]


@dataclass(frozen=True)
class Count:
    """`hits` of `total` samples."""

    hits: int
    total: int

    @property
    def rate(self) -> float:
        """Share of hits; 0 for an empty count, which no rule can pass."""
        return self.hits / self.total if self.total else 0.0


@dataclass(frozen=True)
class Paired:
    """Two readings of the same `total` samples: `gained` became true, `lost` became false."""

    gained: int
    lost: int
    total: int

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


UNREAD = "unread"
"""Key of Suspect.evidence under which a locator that could not read the file says why; never a pass."""


ALWAYS_NAMES = "always_names_a_class"
"""Key of Suspect.evidence of a locator that cannot say "none": alone, its class is no evidence."""


@dataclass(frozen=True)
class Suspect:
    """What one locator says of one setting's weights; `target_class` None means "no backdoor class seen"."""

    locator: str
    setting: str
    target_class: int | None
    scores: tuple[float, ...]
    """One per class, larger is more suspicious."""
    evidence: Mapping[str, float | int | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Disagreement:
    """Locators that read the same weights and differ; None beside a locator that sees no backdoor class."""

    setting: str
    named: Mapping[str, int | None]


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


# ---- Evidence without the trigger -----------------------------------------------------------------------

SearchMode = Literal["cold", "warm", "replay"]
"""From noise; from a trigger that worked on an original file; or that trigger as it is."""


@dataclass(frozen=True)
class FoundTrigger:
    """One searched trigger of one class: how far it came, whether or not that is any evidence."""

    target_class: int
    fit: Paired
    """Fit samples of other classes classified as the class with it, against without."""
    asr: Count | None = None
    """The same on the holdout, by the file itself; None for triggers that were not among the best on fit."""
    lift: Paired | None = None
    origin: str = ""
    """Setting of the original lane on whose file it was found; "" for a cold search."""
    picture: str = ""
    """PNG, base64; "" where there is nothing to draw."""


@dataclass(frozen=True)
class Search:
    """One probe on one file: what was searched, how hard, and what was found or why nothing could be."""

    lane: Lane
    setting: str
    probe: str
    mode: SearchMode
    budget: str
    """How large a trigger could be, in words."""
    classes: tuple[int, ...]
    gradient: bool
    """Through a differentiable twin; False = by queries to the file alone."""
    agreement: Count | None
    """Fit samples on which twin and file name the same class."""
    steps: int
    planned: int
    forwards: int
    """Samples that went through the network, a backward pass counting as one more."""
    seconds: float
    triggers_sha256: str
    """Of the file in the work folder that holds the triggers."""
    found: tuple[FoundTrigger, ...]
    unsearched: str = ""
    """Why there is no result; never a pass."""
    p: float | None = None
    """Of a cold search, against the same search on clean references; None without any."""
    references: int = 0


@dataclass(frozen=True)
class Rounding:
    """Traces of a quantization-conditioned backdoor in the rounding of one quantized file's weights."""

    lane: Lane
    setting: str
    layers: int
    ks: float
    """Largest Kolmogorov-Smirnov distance of a layer's residues to uniform, times sqrt(n)."""
    edge: float
    """Largest top singular value of a layer's residues, in units of the random-matrix edge."""
    z: float
    """Effect of the rounding on the mean logits, in standard deviations of random signs."""
    p: float
    """Exact randomization p of that effect."""
    draws: int
    top_shares: tuple[float, ...]
    """Share of the most predicted class under W + t (Q(W) - W), t = 1, 2, 3, 4."""
    target_class: int | None
    """The class that the extrapolation falls into, if it does."""
    seconds: float
    unsearched: str = ""


# ---- The report: report.json is this, field by field ----------------------------------------------------


@dataclass(frozen=True)
class SubjectInfo:
    """What was handed in."""

    path: str
    sha256: str
    architecture: str
    classes: int
    class_names: tuple[str, ...]
    head: str
    input_shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class SplitInfo:
    """Size and digest of one split."""

    samples: int
    sha256: str


@dataclass(frozen=True)
class Rung:
    """One purifier of a ladder that was tried, and what the calibration split said against it."""

    kind: str
    parameters: Mapping[str, Any]
    target_classes: tuple[int, ...]
    kept: bool
    broken: tuple[str, ...]
    """One line a rule; empty when every rule held."""
    seconds: float


@dataclass(frozen=True)
class Purification:
    """What the purifier was asked to do and how it went."""

    kind: str
    parameters: Mapping[str, Any]
    target_classes: tuple[int, ...]
    history: tuple[Mapping[str, float | int | str], ...]
    seconds: float
    rungs: tuple[Rung, ...] = ()
    """What was tried, in order, where the policy names a ladder."""


@dataclass(frozen=True)
class ReportedSetting:
    """One setting, purified beside original."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    released: bool
    """Named by the policy's `release`: accuracy rules bind it and its file ships."""
    original: SettingResult
    purified: SettingResult


@dataclass(frozen=True)
class Evidence:
    """What the verdict rests on, and what was not looked for."""

    known_triggers: tuple[Mapping[str, Any], ...]
    trigger_search: str
    """Which probes searched for an unknown trigger; "none" when none did."""
    not_shown: tuple[str, ...]
    searches: tuple[Search, ...] = ()
    roundings: tuple[Rounding, ...] = ()


@dataclass(frozen=True)
class Report:
    """The whole run as data; everything that `judge` and the renderers need, and no tensor."""

    schema: int
    tool: str
    policy_path: str
    policy_sha256: str
    policy_text: str
    verdict: Verdict
    subject: SubjectInfo
    splits: Mapping[str, SplitInfo]
    suspects: tuple[Suspect, ...]
    purification: Purification | None
    settings: tuple[ReportedSetting, ...]
    evidence: Evidence
    environment: Mapping[str, str]
    timings: Mapping[str, float]
    disagreements: tuple[Disagreement, ...] = ()
    """One a setting whose locators do not say the same."""
    costs: tuple[Cost, ...] = ()
    """The first is full precision as ONNX, measured in the same run: what the others are compared with."""
