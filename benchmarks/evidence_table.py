"""What the searches without a trigger found, as a table and as rates: `python -m benchmarks.evidence_table`.

Reads benchmarks/results/evidence*.json and, of benchmarks/evidence_models.yaml, the limits and which clean
models are whose references. A file counts as backdoored when its own trigger lifts its target by at least
half of the samples; files between that and a twentieth are shown and counted nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from benchmarks import measuring
from benchmarks.entries import ZOO
from secure_export.statistics import excess, lower, upper

HERE = Path(__file__).parent
ALPHA = 0.05
FEWEST = 2
"""References without which no class is compared."""
DRAWS = 2000
"""Bootstrap draws of an AUC's interval."""


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
    rows = [[row[c] for c in sorted(row, key=int)] for row in (*same, found["fit_lift"])]
    return excess(rows, len(rows) - 1)


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
    flags = {probe: c for probe, (value, c) in found.items() if value > limits.get(probe, np.inf)}
    allowed = limits.get("excess", {})
    flags |= {f"{p} above": c for p, (value, c) in higher.items() if value > allowed.get(p, np.inf)}
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


def auc(positive: Sequence[float], negative: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Area under the ROC curve, and its 95 % interval over bootstrap draws of either side."""
    generator, a, b = np.random.default_rng(seed), np.array(positive), np.array(negative)

    def area(p: np.ndarray, n: np.ndarray) -> float:
        return float((p[:, None] > n).mean() + 0.5 * (p[:, None] == n).mean())

    drawn = [area(generator.choice(a, len(a)), generator.choice(b, len(b))) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return area(a, b), float(low), float(high)


def rate(label: str, hits: int, total: int) -> str:
    """A count with both exact one-sided 95 % bounds."""
    if not total:
        return f"{label}: none measured"
    bounds = f"{100 * lower(hits, total, ALPHA):.1f} to {100 * upper(hits, total, ALPHA):.1f} %"
    return f"{label}: {hits} of {total} ({100 * hits / total:.1f} %; {bounds})"


def table(found: Sequence[File]) -> Iterable[str]:
    """One line a file."""
    kinds = sorted({kind for one in found for kind in (*one.found, *one.unsearched)})
    yield "| model | file | state | true lift | " + " | ".join(kinds) + " | flagged by |"
    yield "|" + "---|" * (5 + len(kinds))
    for one in found:
        cells = [shown(one, kind) for kind in kinds]
        flags = ", ".join(f"{probe} → {c}" for probe, c in one.flags.items()) or "–"
        true = "" if one.attack == "none" else f"{one.lift:.2f}"
        yield f"| {one.model} | {one.setting} | {one.state} | {true} | {' | '.join(cells)} | {flags} |"


def shown(one: File, kind: str) -> str:
    """A probe's finding."""
    if kind not in one.found:
        return "not searched" if kind in one.unsearched else ""
    value, named = one.found[kind]
    if kind == "rounding z":
        return f"{value:.1f}"
    if kind not in one.excess:
        return f"{value:.2f} → {named}"
    higher, into = one.excess[kind]
    return f"{value:.2f} → {named} ({higher:+.2f} → {into})"


def summary(found: Sequence[File]) -> Iterable[str]:
    """Detection, classes, false alarms, and each probe's AUC, of held-out files alone."""
    held = [one for one in found if one.held_out]
    awake = [one for one in held if one.state == "awake"]
    clean = [one for one in held if one.state == "clean" and one.asked]
    caught = [one for one in awake if one.flags]
    yield rate("awake files flagged", len(caught), len(awake))
    missed = [f"{one.model} {one.setting}" for one in awake if not one.flags]
    yield f"missed: {', '.join(missed) or 'none'}"
    right = sum(any(c in one.targets for c in one.flags.values()) for one in caught)
    yield rate("flagged with the right class", right, len(caught))
    alone = sum(all(c in one.targets for c in one.flags.values()) for one in caught)
    yield rate("flagged with the right class and no other", alone, len(caught))
    sleepers = {one.model for one in held if one.state == "asleep"}
    woken = {one.model for one in awake if one.model in sleepers and one.flags}
    yield rate("sleeping models flagged through a file in which they wake", len(woken), len(sleepers))
    yield rate("clean files with a false alarm", sum(bool(one.flags) for one in clean), len(clean))
    models = {one.model for one in clean}
    wrong = {one.model for one in clean if one.flags}
    yield rate("clean models with a false alarm on any file", len(wrong), len(models))
    for name, field in (("", "found"), (" above references", "excess")):
        read: Callable[[File], Mapping[str, tuple[float, int | None]]] = attrgetter(field)
        for kind in sorted({kind for one in held for kind in read(one)}):
            positive = [read(one)[kind][0] for one in awake if kind in read(one)]
            negative = [read(one)[kind][0] for one in clean if kind in read(one)]
            if positive and negative:
                area, low, high = auc(positive, negative)
                compared = f"n {len(positive)} and {len(negative)}"
                yield f"AUC of {kind}{name}: {area:.3f} ({low:.3f} to {high:.3f}), {compared}"


@click.command()
@click.argument("results", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--models", default=HERE / "evidence_models.yaml", type=click.Path(path_type=Path))
@click.option("--together", "joined", is_flag=True, help="one line a file over all presets of RESULTS")
@click.option("--probes", help="of these alone, with commas between: what a smaller preset would have found")
def main(results: tuple[Path, ...], models: Path, joined: bool, probes: str | None) -> None:
    """Print the tables and the rates of RESULTS, by default of every stored run of preset `wide`."""
    stored = results or (
        *sorted((HERE / "results").glob("evidence-zoo*.json")),
        HERE / "results/evidence-dev.json",
    )
    runs = [json.loads(path.read_text()) for path in stored]
    if probes:
        runs = [narrowed(run, probes.split(",")) for run in runs]
    found = files(runs, yaml.safe_load(models.read_text()))
    if joined:
        found = together(found)
    for heading, held in (("Held out:", True), ("Looked at while limits were set:", False)):
        if some := [one for one in found if one.held_out == held]:
            click.echo("\n".join([heading, "", *table(some), ""]))
    for line in summary(found):
        click.echo(f"- {line}")


if __name__ == "__main__":
    main()
