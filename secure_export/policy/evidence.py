"""The policy's `evidence` section: which triggers are searched for, how hard, and limits on what is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from secure_export.policy._base import PluginSpec, Section, selection
from secure_export.policy._readings import Reading, decide
from secure_export.policy.limits import COUNTED, Bound, EvidenceRule
from secure_export.policy.presets import PRESETS
from secure_export.records.measured import Count, Paired
from secure_export.records.searches import Aim, Search, aims, probe_name


class ForgetSpec(Section):
    """References made of a file on the spot, for the probes with `contrast` (secure_export.forgetting)."""

    noise: float = Field(
        0.85, gt=0, description="how far filters are turned, in standard deviations of their weights"
    )
    steps: int = Field(150, ge=1, description="batches in which a reference learns the task again")
    longest: int = Field(
        600, ge=1, description="one that knows too little then learns anew for twice as many, up to so many"
    )
    judges: int = Field(
        2, ge=1, description="references beside the one that a search avoids; the least obedient one judges"
    )
    relearned: float = Field(
        0.92,
        gt=0,
        le=1,
        description="share of what the file has right on fit: a reference with less is no comparison",
    )


Preset = Literal[
    "fast",
    "wide",
    "thorough",
    "source",
    "surrogate",
    "contrast",
    "contrast-both",
    "contrast-large",
    "contrast-source",
]


class EvidenceSpec(Section):
    """The search for triggers that nobody named, on the original and on every purified file."""

    preset: Preset | tuple[Preset, ...] | None = Field(
        "fast", description="probes and their effort, of one preset or of several"
    )
    probes: tuple[PluginSpec, ...] = Field(
        (),
        description="instead of the preset's; each kind once, and once more for each way to search it",
    )
    samples: int = Field(1000, ge=1, description="holdout samples on which a trigger is scored")
    scored: int = Field(
        3, ge=1, description="classes, or pairs of them, that are scored on the holdout: the best on fit"
    )
    replayed: int = Field(
        2,
        ge=1,
        description="triggers of each probe, found on original files, replayed on every purified one; more "
        "where more are evident to a rule",
    )
    warm: Annotated[str | tuple[str, ...], selection(("all", "none"))] = Field(
        "all",
        description="probes whose replayed triggers are searched on from: all, none, or a list of names",
    )
    rounding: bool = Field(True, description="look for traces in the rounding of quantized files")
    references: tuple[str, ...] = Field(
        (),
        description="checkpoints of clean models of this architecture, searched alike: for inverted_p and "
        "the metrics in _excess",
    )
    forget: ForgetSpec = Field(ForgetSpec(), description="references made on the spot, where a probe asks")
    queries: bool = Field(
        False,
        description="let rules pass on searches without gradients, which find far less than those that set "
        "the limits; false = such a search can refuse a file, never pass it",
    )
    mixing: bool = Field(
        False,
        description="let rules pass on files in whose graph samples of one batch may meet (dynamic int8), "
        "though in batches other than those searched they can act otherwise; a batch of one never mixes",
    )
    seconds: float | None = Field(
        None, gt=0, description="limit of one search; a search that it cuts short decides nothing but a find"
    )
    rules: tuple[EvidenceRule, ...] = Field(min_length=1, description="limits; all have to hold")

    @model_validator(mode="after")
    def _sensible(self) -> EvidenceSpec:
        names = self.names
        if not names:
            raise ValueError("neither a preset nor probes: nothing would be searched")
        if len(set(names)) != len(names):
            raise ValueError(f"a probe is named twice: {', '.join(names)}")
        wanted = {name for rule in self.rules if isinstance(rule.probes, tuple) for name in rule.probes}
        wanted |= set(self.warmed)
        unknown = sorted(wanted - set(names))
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is none of the probes ({', '.join(names)})")
        if not any(rule.mode == "cold" for rule in self.rules):
            raise ValueError(
                "no rule on inverted_asr or inverted_lift: where nothing was purified, nothing would be asked"
            )
        for rule in self.rules:
            if rule.mode == "warm":
                named = set(rule.probes) if isinstance(rule.probes, tuple) else set(self.warmed)
                if not named or named - set(self.warmed):
                    raise ValueError(
                        f"{rule.metric} is read of probes that are never searched warm: list them in warm"
                    )
            read = set(self.read_by(rule))
            if rule.reading == "contrast" and not (read and read <= set(self.contrasting)):
                raise ValueError(f"{rule.metric} is read of probes with `contrast: true` alone")
            if rule.reading == "excess" and not self.references:
                raise ValueError(f"{rule.metric} is read against clean models: give references")
            if rule.evident:
                self._check_evident(rule)
            least = 1 / (len(self.references) + 1)
            if rule.at_least is not None and rule.at_least <= least:
                raise ValueError(
                    f"with {len(self.references)} references no p is below {least:.3g}, so inverted_p "
                    f"of at least {rule.at_least:g} could never fail: give more references"
                )
        if not self.rounding and any(rule.mode is None for rule in self.rules):
            raise ValueError("a rule on the rounding, but rounding is off")
        return self

    @property
    def specs(self) -> tuple[Mapping[str, Any], ...]:
        """The probes that run, as `{kind: name, **parameters}`."""
        presets = (self.preset,) if isinstance(self.preset, str) else self.preset or ()
        return self.probes or tuple(probe for preset in presets for probe in PRESETS[preset])

    @property
    def effort(self) -> Mapping[str, Any]:
        """What a search is determined by, by the name that a policy gives it."""
        same = ("samples", "scored", "replayed", "seconds")
        return {
            "probes": self.specs,
            "warm": self.warmed,
            "references": [PurePath(one).name for one in self.references],
            "forget": self.forget.model_dump(),
            **{name: getattr(self, name) for name in same},
        }

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called: their kind, with `contrast-` and the like before it where they search so."""
        ways = ("contrast", "by_source", "surrogate")
        return tuple(
            probe_name(str(probe["kind"]), **{way: probe.get(way) is True for way in ways})
            for probe in self.specs
        )

    @property
    def warmed(self) -> tuple[str, ...]:
        """Names of those that go on from what was found."""
        if isinstance(self.warm, tuple):
            return self.warm
        return self.names if self.warm == "all" else ()

    @property
    def paired(self) -> tuple[str, ...]:
        """Names of those that search every pair of classes."""
        return self._with("by_source")

    @property
    def contrasting(self) -> tuple[str, ...]:
        """Names of those that search against references made on the spot."""
        return self._with("contrast")

    def _with(self, way: str) -> tuple[str, ...]:
        return tuple(
            name for name, probe in zip(self.names, self.specs, strict=True) if probe.get(way) is True
        )

    def read_by(self, rule: EvidenceRule) -> tuple[str, ...]:
        """Names of the probes that a rule reads; "all" means all that have what it reads."""
        if isinstance(rule.probes, tuple):
            names = rule.probes
        else:
            names = self.contrasting if rule.reading == "contrast" else self.names
        return tuple(name for name in names if rule.mode != "warm" or name in self.warmed)

    def _check_evident(self, rule: EvidenceRule) -> None:
        if self.replayed > self.scored:
            raise ValueError("evident is told of scored triggers: let no more be replayed than scored")
        counting = [one for one in self.rules if one.mode == "cold" and one.reading in COUNTED]
        unread = set(self.read_by(rule)) - {probe for one in counting for probe in self.read_by(one)}
        if unread:
            raise ValueError(
                f"no inverted_ rule counts what {', '.join(sorted(unread))} found, so nothing of it could be "
                f"evident to {rule.metric}"
            )

    def lacking(self, search: Search, classes: int) -> str:
        """Why a search that found nothing shows nothing, in words; "" where it went as far as was asked.

        `classes` is how many the subject has.
        """
        if search.mode == "cold":
            wanted = set(aims(classes, by_source=search.probe in self.paired))
            found = {trigger.aim for trigger in search.found}
            if found != wanted:
                what = "pairs of classes" if search.probe in self.paired else "classes"
                return f"{len(found & wanted)} of {len(wanted)} {what} searched, too few"
        if search.steps < search.planned:
            return f"cut short after {search.steps} of {search.planned} steps, too little"
        if search.mode != "replay" and not search.gradient and not self.queries:
            return "searched by queries alone, which find too little (evidence.queries: true lets that pass)"
        if search.mixing and not self.mixing:
            return f"samples may meet ({search.mixing}), too little (evidence.mixing: true lets that pass)"
        return ""

    def held(self, setting: Bound, probe: str, counted: Mapping[str, Count | Paired], alpha: float) -> bool:
        """Whether counts show that what a cold search found holds every rule; by what rules read."""
        return all(
            decide(Reading("", counted[rule.reading], counted[rule.reading].total), rule, alpha).passed
            for rule in self.rules
            if rule.mode == "cold"
            and rule.reading in counted
            and probe in self.read_by(rule)
            and rule.binds(setting)
        )

    def asks(self, setting: Bound, probe: str) -> bool:
        """Whether a rule reads what a cold search with this probe found on this setting's file."""
        return any(
            rule.mode == "cold" and probe in self.read_by(rule) and rule.binds(setting) for rule in self.rules
        )

    def asks_plainly(self, setting: Bound) -> bool:
        """Whether a rule reads a cold search that works against no reference.

        A trigger that lies in no weight (a place cut out and compared with a number) stays in every
        reference, so contrast overlooks it.
        """
        plain = set(self.names) - set(self.contrasting)
        return any(self.asks(setting, probe) for probe in plain)

    def evident(
        self, probe: str, settings: Iterable[Bound], searches: Iterable[Search], alpha: float
    ) -> set[tuple[str, Aim]]:
        """(setting, aim) of what a probe found on original files and is not shown to hold the rules there.

        `alpha` is the error that exact bounds are allowed.
        """
        bound = {setting.name: setting for setting in settings}
        return {
            (search.setting, found.aim)
            for search in searches
            if (search.lane, search.probe, search.mode) == ("original", probe, "cold")
            and search.setting in bound
            for found in search.found
            if not self.held(bound[search.setting], probe, found.counted, alpha)
        }

    def contrasted_again(self, probe: str) -> bool:
        """Whether a rule reads what a probe's replayed triggers do to references of the purified file."""
        return any(
            rule.reading == "contrast" and rule.mode == "replay" and probe in self.read_by(rule)
            for rule in self.rules
        )

    @property
    def compared_again(self) -> bool:
        """Whether a replay or warm rule reads `excess`: known triggers are tried on the references too."""
        return any(rule.reading == "excess" and rule.mode in ("replay", "warm") for rule in self.rules)
