"""What the searches without a trigger found, file by file, of benchmarks/results/evidence*.json.

A file counts as backdoored when its own trigger lifts its target by at least half of the samples; files
between that and a twentieth are shown and counted nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from benchmarks import measuring
from benchmarks.entries import ZOO
from secure_export.statistics import excess

FEWEST = 2
"""References without which no class is compared."""


@dataclass(frozen=True)
class File:
    """One setting of one model: what is true, what was found."""

    model: str
    setting: str
    held_out: bool
    attack: str
    targets: tuple[int, ...]
    lift: float
    """Of the true trigger."""
    found: Mapping[str, tuple[float, int | None]]
    """(largest lift on the holdout, or contrast; its class) of every probe that searched; also rounding z."""
    excess: Mapping[str, tuple[float, int]]
    """(largest lift on fit above the references' median, class by class; its class) of every probe."""
    unsearched: Sequence[str]
    flags: Mapping[str, int | None]
    """Readings over their limit, with the class that they name."""

    @property
    def state(self) -> str:
        """Clean, awake, asleep or half."""
        if self.attack == "none":
            return "clean"
        return measuring.state(self.lift, measuring.HALF)

    @property
    def asked(self) -> bool:
        """Whether any search was made: a file that none could be is no silent one."""
        return not self.unsearched or bool(self.found.keys() - {"rounding z"})


def files(results: Iterable[Mapping[str, Any]], known: Mapping[str, Any]) -> list[File]:
    """Every measured (model, setting) of the stored results."""
    stored = list(results)
    rows = {
        (name, setting, one["preset"]): (about, row)
        for one in stored
        for name, about in one["models"].items()
        for setting, row in about["rows"].items()
        if "unmeasured" not in row
    }
    return [
        file(name, about, setting, row, known, preset, references(rows, known, name, setting, preset))
        for (name, setting, preset), (about, row) in rows.items()
    ]


def references(
    rows: Mapping[tuple[str, str, str], Any], known: Mapping[str, Any], model: str, setting: str, preset: str
) -> list[Mapping[str, Any]]:
    """What the same searches found on the clean models that this one is compared with, itself left out."""
    group = next((one for one in known["references"] if matches(model, one["models"])), None)
    return [
        row["probes"]
        for (name, other, effort), (_, row) in rows.items()
        if group and name != model and matches(name, group["of"]) and (other, effort) == (setting, preset)
    ]


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the patterns is meant."""
    return any(fnmatch(name, glob) for glob in globs)


def above(
    probe: str, found: Mapping[str, Any], clean: Sequence[Mapping[str, Any]]
) -> tuple[float, int] | None:
    """As the metric `inverted_excess` of a policy; None without two references."""
    same = [one[probe]["fit_lift"] for one in clean if one.get(probe, {}).get("fit_lift")]
    if len(same) < FEWEST or not found["fit_lift"]:
        return None
    aims = sorted(found["fit_lift"], key=lambda aim: [int(c) for c in aim.split(" > ")])
    higher, column = excess([[row[aim] for aim in aims] for row in (*same, found["fit_lift"])], len(same))
    return higher, int(aims[column].split(" > ")[-1])


def file(
    name: str,
    about: Mapping[str, Any],
    setting: str,
    row: Mapping[str, Any],
    known: Mapping[str, Any],
    preset: str,
    clean: Sequence[Mapping[str, Any]],
) -> File:
    """One row with its flags."""
    limits = next(one for one in known["limits"] if binds(one, name, setting, preset))
    found: dict[str, tuple[float, int | None]] = {
        probe: (value, one["class"])
        for probe, one in row["probes"].items()
        if (value := reading(one)) is not None
    }
    if row.get("rounding"):
        found["rounding z"] = (row["rounding"]["z"], row["rounding"]["target_class"])
    compared = {probe: above(probe, one, clean) for probe, one in row["probes"].items()}
    higher = {probe: value for probe, value in compared.items() if value is not None}
    flags = {probe: c for probe, (value, c) in found.items() if value > limits.get(probe, math.inf)}
    allowed = limits.get("excess", {})
    flags |= {f"{p} above": c for p, (value, c) in higher.items() if value > allowed.get(p, math.inf)}
    gained, lost, total = row["truth"].get("lift", (0, 0, 1))
    return File(
        model=name,
        setting=setting,
        held_out=not any(binds(one, name, setting, preset) for one in known["thresholds"]),
        attack=about["attack"],
        targets=targets(about),
        lift=(gained - lost) / total,
        found=found,
        excess=higher,
        unsearched=[probe for probe, one in row["probes"].items() if one["unsearched"]],
        flags=flags,
    )


def reading(found: Mapping[str, Any]) -> float | None:
    """What a probe's limit is about: the contrast where it makes one, else the lift."""
    contrast: float | None = found.get("contrast")
    lift: float | None = found["lift"]
    return lift if contrast is None else contrast


def together(files: Sequence[File]) -> list[File]:
    """One line a file, of all efforts that it was searched with; their probes have names of their own."""
    made: dict[tuple[str, str], File] = {}
    for one in files:
        known = made.get((one.model, one.setting))
        made[one.model, one.setting] = (
            one
            if known is None
            else replace(
                known,
                found={**known.found, **one.found},
                excess={**known.excess, **one.excess},
                unsearched=[*known.unsearched, *one.unsearched],
                flags={**known.flags, **one.flags},
            )
        )
    return list(made.values())


def narrowed(run: Mapping[str, Any], probes: Sequence[str]) -> dict[str, Any]:
    """A stored run as if these probes alone had searched, which they would have done in the same way."""

    def row(found: Mapping[str, Any]) -> Mapping[str, Any]:
        if "unmeasured" in found:
            return found
        return {**found, "probes": {name: one for name, one in found["probes"].items() if name in probes}}

    models = {
        name: {**about, "rows": {setting: row(found) for setting, found in about["rows"].items()}}
        for name, about in run["models"].items()
    }
    return {**run, "models": models}


def targets(about: Mapping[str, Any]) -> tuple[int, ...]:
    """The class of every backdoor that was planted."""
    entry = ZOO.get(about["card"])
    second = () if entry is None or entry.second is None else (entry.second[1],)
    return (about["target_class"], *second)


def binds(entry: Mapping[str, Any], model: str, setting: str, preset: str) -> bool:
    """Whether an entry, of limits or of thresholds, is meant for this file and effort."""
    named = matches(model, entry.get("models", ["*"])) and preset in entry.get("presets", ["fast", "wide"])
    return named and matches(setting, entry.get("settings", ["*"]))
