"""The policy file as frozen values: what is made, what ships, and which rules bind it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from secure_export.policy._base import PluginSpec, Section
from secure_export.policy._base import spec as with_kind
from secure_export.policy.evidence import EvidenceSpec
from secure_export.policy.limits import Rule
from secure_export.policy.yaml import Loc, Source
from secure_export.records.measured import Samples
from secure_export.records.reported import MOST_CLASSES

Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@=+-]*$", max_length=100, description="letters, digits, ._@=+-"),
]
"""Names become file names: nothing that a path could be made of, and never hidden."""

ARTIFACT = "artifact"
"""The one setting of a job on a file that another tool made; also how a report names its architecture."""
MOST_SETTINGS = 1000
"""With every sweep resolved."""
PATHS = ("subject.model", "subject.artifact", "data.path", "data.holdout_path")
"""Keys that name a place on a machine, which no report speaks of."""


def _ladder(value: Any) -> Any:
    if not isinstance(value, list):
        return value if value is None else with_kind(value)
    if not value:
        raise ValueError("a ladder names at least one purifier; null turns purification off")
    return tuple(with_kind({"kind": rung} if isinstance(rung, str) else rung) for rung in value)


def _sweeps(value: dict[str, Any]) -> dict[str, Any]:
    for key, swept in value.items():
        if isinstance(swept, dict) and "sweep" in swept:
            choices = swept["sweep"]
            if set(swept) != {"sweep"} or not isinstance(choices, list) or not choices:
                raise ValueError(f"{key}: a sweep is {{sweep: [value, ...]}} with at least one value")
            if any(isinstance(choice, list | dict) or choice is None for choice in choices):
                raise ValueError(f"{key}: a sweep goes over numbers or words")
    return value


def _version(value: int) -> int:
    if value != 1:
        raise ValueError(f"this tool reads version 1, got {value}")
    return value


Purify = Annotated[dict[str, Any] | tuple[dict[str, Any], ...] | None, BeforeValidator(_ladder)]
"""A PluginSpec, or a ladder of them in which a name alone stands for its defaults."""
StepSpec = Annotated[PluginSpec, AfterValidator(_sweeps)]
"""A PluginSpec in which a parameter may be `{sweep: [...]}`."""


class SubjectSpec(Section):
    """What is handed in; a flag of the command line overrides each of these."""

    model: str | None = Field(None, description="checkpoint, relative to the working directory")
    artifact: str | None = Field(
        None,
        description="ONNX file of another tool to judge as it is; model is then what it is compared with",
    )
    architecture: str | None = Field(
        None, description="timm:NAME, torchvision:NAME or package.module:factory"
    )
    classes: int | None = Field(
        None, ge=2, le=MOST_CLASSES, description="number of classes; null = as the checkpoint's head has"
    )
    head: str | None = Field(None, description="qualified name of the head; null = found by tracing")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="per channel, of inputs in [0, 1]")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, min_length=1, description="per channel"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> SubjectSpec:
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std go together, one value per channel")
        return self


class DataSpec(Section):
    """Clean labelled samples, and how they are split."""

    path: str | None = Field(None, description="folder of class folders, file.npz or package.module:factory")
    holdout_path: str | None = Field(None, description="where the holdout comes from; null = from path")
    resize: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="[height, width]; null = all images have one size"
    )
    channels: Literal[1, 3] | None = Field(3, description="3 = RGB, 1 = grey, null = as the file is")
    fit: Samples = Field(500, ge=1, description="samples for locators and purifiers")
    calibration: Samples = Field(500, ge=1, description="samples for compression")
    holdout: Samples | None = Field(None, ge=1, description="samples for measuring; null = all that is left")


class Locate(Section):
    """Which locators run, and whose word counts."""

    methods: tuple[PluginSpec, ...] = Field(min_length=1, description="locators; each kind once")
    decisive: tuple[str, ...] = Field(min_length=1, description="kinds whose suspects are purified")
    unconfirmed: Literal["accept", "purify", "refuse"] = Field(
        "refuse", description="a class that only the other locators name; purify: in the first round"
    )
    rounds: int = Field(
        1, ge=1, le=10, description="locate, purify, and again while a decisive locator names a new class"
    )


class SettingSpec(Section):
    """A named chain of compression steps, or a family of them when a step has a sweep."""

    name: Name
    steps: tuple[StepSpec, ...] = Field(description="in order; [] = full precision")
    format: PluginSpec = Field({"kind": "onnx"}, description="the file that ships")


class TriggerSpec(Section):
    """A known trigger: `{name: patch, kind: badnets, **parameters}`; the name defaults to the kind."""

    name: Name
    plugin: PluginSpec = Field(description="{kind: name, **parameters}, for registry.build")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        flat = dict(with_kind(value))
        return {"name": flat.pop("name", flat["kind"]), "plugin": flat}


@dataclass(frozen=True)
class Setting:
    """One chain of steps with every sweep resolved; the report stores name and steps as they are here."""

    name: str
    steps: tuple[dict[str, Any], ...]
    format: dict[str, Any]
    released: bool


class Policy(Section):
    """The whole file; load_policy() and parse_policy() make one that can be used."""

    version: Annotated[int, AfterValidator(_version)] = Field(description="of this schema: 1")
    seed: int = Field(0, ge=0, lt=2**63, description="of every random choice")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="one-sided, of every exact bound")
    subject: SubjectSpec = Field(SubjectSpec(), description="what is handed in")
    data: DataSpec = Field(DataSpec(), description="clean labelled samples")
    locate: Locate = Field(description="which locators run, and whose word counts")
    purify: Purify = Field(
        description="a purifier, or a list: the first that holds on the calibration split; null = off"
    )
    settings: tuple[SettingSpec, ...] = Field(min_length=1, description="what is made and measured")
    release: tuple[str, ...] = Field(min_length=1, description="names or globs of the settings that ship")
    triggers: tuple[TriggerSpec, ...] = Field(min_length=1, description="those that are tried by name")
    rules: tuple[Rule, ...] = Field(min_length=1, description="limits; all have to hold")
    precise_int8: bool = Field(
        False,
        description="open ONNX files with exact int8 sums on x86 CPUs without VNNI, where they saturate "
        "otherwise; sessions that deploy them have to ask for it too",
    )
    costs: bool = Field(False, description="measure latency and memory of what ships, beside full precision")
    evidence: EvidenceSpec | None = Field(
        None, description="search for a trigger that nobody named; null = only known triggers are tried"
    )

    @field_validator("settings")
    @classmethod
    def _so_many(cls, settings: tuple[SettingSpec, ...]) -> tuple[SettingSpec, ...]:
        made = sum(math.prod(len(choices) for _, _, choices in _swept(spec)) for spec in settings)
        if made > MOST_SETTINGS:
            raise ValueError(f"sweeps make {made} settings, expected at most {MOST_SETTINGS}")
        return settings

    _source: Source = PrivateAttr(default=Source("policy", ""))
    _sha256: str = PrivateAttr(default="")
    _overrides: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it was read, as the user wrote it."""
        return self._source.name

    @property
    def text(self) -> str:
        """The file as it was read, before flags and environment."""
        return self._source.text

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self._sha256

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Values of flags and environment that won over the file, by dotted key; no path of this machine."""
        return {key: value for key, value in self._overrides.items() if key not in PATHS}

    @property
    def source(self) -> Source:
        """Where each value stood."""
        return self._source

    def for_artifact(self, path: str) -> Policy:
        """This policy for a file that another tool made: its settings and release do not apply."""
        return self.model_copy(update={"subject": self.subject.model_copy(update={"artifact": path})})

    @property
    def rungs(self) -> tuple[Mapping[str, Any], ...]:
        """The purifiers in the order in which they are tried."""
        if self.purify is None:
            return ()
        return (self.purify,) if isinstance(self.purify, dict) else self.purify

    def expanded_settings(self) -> tuple[Setting, ...]:
        """Every setting, sweeps resolved, in the order of the file."""
        return tuple(setting for setting, _ in self.placed_settings())

    def placed_settings(self) -> Iterator[tuple[Setting, Mapping[Loc, Loc]]]:
        """Every setting, and where it stands: () to its loc, a swept parameter's loc to its choice's."""
        if self.subject.artifact is not None:
            yield Setting(ARTIFACT, (), {"kind": "onnx"}, True), {(): ("subject", ARTIFACT)}
            return
        for index, spec in enumerate(self.settings):
            swept = _swept(spec)
            for picks in itertools.product(*(range(len(choices)) for _, _, choices in swept)):
                steps = [dict(step) for step in spec.steps]
                places: dict[Loc, Loc] = {}
                name = spec.name
                for (j, key, choices), pick in zip(swept, picks, strict=True):
                    steps[j][key] = choices[pick]
                    name += f"@{_shown(choices[pick])}"
                    places["settings", index, "steps", j, key] = (
                        *("settings", index, "steps", j, key),
                        *("sweep", pick),
                    )
                released = any(fnmatchcase(name, glob) for glob in self.release)
                yield (
                    Setting(name, tuple(steps), dict(spec.format), released),
                    {(): ("settings", index), **places},
                )


def _swept(spec: SettingSpec) -> list[tuple[int, str, list[Any]]]:
    """Step, parameter and choices of every sweep."""
    return [
        (j, key, value["sweep"])
        for j, step in enumerate(spec.steps)
        for key, value in step.items()
        if isinstance(value, dict) and "sweep" in value
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
