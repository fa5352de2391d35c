"""Limits of a policy: on what is counted with known triggers, and on what a search found."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Protocol

from pydantic import Field, ValidationInfo, field_validator, model_validator

from secure_export.policy._base import Section, selection

AT_MOST = ("acc_drop", "asr", "lift", "source_lift", "logit_difference", "top_share")
CARRIED = ("asr", "lift", "source_lift")
"""What says how many samples a known trigger carries."""
PER_TRIGGER = (*CARRIED, "ra")
COMPARING = ("acc_drop", "agreement", "logit_difference")
PAIRED = ("acc_drop", "lift")

Metric = Literal[
    "inverted_asr",
    "inverted_lift",
    "inverted_p",
    "inverted_excess",
    "inverted_contrast",
    "replay_asr",
    "replay_lift",
    "replay_excess",
    "replay_contrast",
    "warm_asr",
    "warm_lift",
    "warm_excess",
    "warm_contrast",
    "rounding_ks",
    "rounding_edge",
    "rounding_z",
]
"""What a rule on evidence may read. What a purifier optimizes itself (margins, latent norms) is not here."""
COUNTED = ("asr", "lift", "contrast")
"""Readings that every trigger has of its own; the others are of a whole search."""
MODES: Mapping[str, str] = {"inverted": "cold", "replay": "replay", "warm": "warm"}


class Bound(Protocol):
    """A setting, as far as a rule asks."""

    @property
    def name(self) -> str: ...
    @property
    def released(self) -> bool: ...


class Rule(Section):
    """One limit on one metric."""

    metric: Literal[
        "acc", "acc_drop", "asr", "lift", "source_lift", "ra", "agreement", "logit_difference", "top_share"
    ] = Field(
        description="what is counted on the holdout; source_lift: lift on the samples of one true class, for "
        "every pair of classes"
    )
    at_most: float | None = Field(
        None, ge=0, description="for acc_drop, asr, lift, source_lift, top_share, logit_difference"
    )
    at_least: float | None = Field(None, ge=0, description="for acc, ra, agreement")
    settings: Annotated[str | tuple[str, ...], selection(("all", "released"))] = Field(
        "all", description="all, released, or a list of names and globs"
    )
    classes: Literal["all", "suspects"] = Field(
        "all", description="target classes that asr, lift, source_lift and ra look at"
    )
    triggers: Annotated[str | tuple[str, ...], selection(("all",))] = Field(
        "all", description="all, or a list of names"
    )
    reason: str = Field("", description="why this limit")

    @field_validator("at_most", "at_least")
    @classmethod
    def _a_limit(cls, limit: float | None, info: ValidationInfo) -> float | None:
        metric = info.data.get("metric")
        if limit is None or metric is None:
            return limit
        if (metric in AT_MOST) != (info.field_name == "at_most"):
            raise ValueError(f"{metric} takes {'at_most' if metric in AT_MOST else 'at_least'}")
        if metric == "logit_difference":
            return limit
        if limit > 1:
            raise ValueError(f"{limit:g} is no rate: between 0 and 1, did you mean {limit / 100:g}?")
        if limit == (0 if metric in AT_MOST else 1) and metric not in PAIRED:
            raise ValueError(
                f"no number of samples can show {metric} of exactly {limit:g}: allow for a margin"
            )
        return limit

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.at_most is None and self.at_least is None:
            raise ValueError(f"{self.metric} needs {'at_most' if self.metric in AT_MOST else 'at_least'}")
        if self.metric not in PER_TRIGGER and (self.classes, self.triggers) != ("all", "all"):
            raise ValueError(f"{self.metric} has neither classes nor triggers")
        return self

    @property
    def limit(self) -> float:
        """The one limit that is given."""
        return _given(self)

    @property
    def can_fail(self) -> bool:
        """Whether any count breaks the limit: no rate is above 1 or below 0."""
        return self.metric == "logit_difference" or self.limit != (1 if self.metric in AT_MOST else 0)

    def binds(self, setting: Bound) -> bool:
        """Whether this rule looks at `setting`."""
        return _binds(self, setting)


class EvidenceRule(Section):
    """A limit on what a search found on the purified files."""

    metric: Metric = Field(description="what a search or the rounding says")
    at_most: float | None = Field(None, gt=0, description="for everything but inverted_p")
    at_least: float | None = Field(None, gt=0, lt=1, description="for inverted_p")
    probes: Annotated[str | tuple[str, ...], selection(("all",))] = Field(
        "all", description="all, or a list of names"
    )
    settings: Annotated[str | tuple[str, ...], selection(("all", "released"))] = Field(
        "all", description="all, released, or a list of names and globs"
    )
    evident: bool = Field(
        False,
        description="of replay and warm search, read those triggers alone that are not shown to hold the "
        "inverted_ rules on the original file: the others are natural, and stay after any repair",
    )
    reason: str = Field("", description="why this limit")

    @model_validator(mode="after")
    def _sensible(self) -> EvidenceRule:
        if (self.metric == "inverted_p") != (self.at_least is not None) or self.limits != 1:
            raise ValueError(
                f"{self.metric} takes {'at_least' if self.metric == 'inverted_p' else 'at_most'}"
            )
        if self.evident and (self.mode not in ("replay", "warm") or self.reading not in COUNTED):
            raise ValueError(f"{self.metric} is of no trigger that was found before: evident means nothing")
        if self.mode is None:
            if self.probes != "all":
                raise ValueError(f"{self.metric} has no probes")
        elif self.limit > 1:
            raise ValueError(
                f"{self.limit:g} is no rate: between 0 and 1, did you mean {self.limit / 100:g}?"
            )
        elif self.limit == 1:
            raise ValueError(f"no {self.metric} is above 1, so the rule could never fail")
        return self

    @property
    def limits(self) -> int:
        """How many of the two are given."""
        return (self.at_most is not None) + (self.at_least is not None)

    @property
    def limit(self) -> float:
        """The one limit that is given."""
        return _given(self)

    @property
    def mode(self) -> str | None:
        """The mode of the searches that this rule reads; None for traces in the rounding."""
        return MODES.get(self.metric.split("_")[0])

    @property
    def reading(self) -> str:
        """The field that this rule reads."""
        return self.metric.split("_")[1]

    def binds(self, setting: Bound) -> bool:
        """Whether this rule looks at `setting`."""
        return _binds(self, setting)


def _given(rule: Rule | EvidenceRule) -> float:
    return next(limit for limit in (rule.at_most, rule.at_least) if limit is not None)


def _binds(rule: Rule | EvidenceRule, setting: Bound) -> bool:
    if rule.settings == "released":
        return setting.released
    return rule.settings == "all" or any(fnmatchcase(setting.name, glob) for glob in rule.settings)
