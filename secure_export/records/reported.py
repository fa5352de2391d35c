"""The report: report.json is this, field by field, so it is judged again without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Le

from secure_export.records.measured import Cost, Disagreement, SettingResult, Suspect, Verdict
from secure_export.records.searches import Rounding, Search

MOST_CLASSES = 1_000_000
"""Rules look at every class."""


@dataclass(frozen=True)
class SubjectInfo:
    """What was handed in."""

    path: str
    sha256: str
    architecture: str
    classes: Annotated[int, Le(MOST_CLASSES)]
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
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What stood on the command line or in the environment instead of in the policy's text, but for paths."""
