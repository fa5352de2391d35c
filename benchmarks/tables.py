"""The papers' tables beside ours, from stored results: `python -m benchmarks.tables [--zoo BUILD ...]`.

`published.json` holds every published cell and what of ours answers it. Nothing is measured here, and a cell
that nothing stored answers says "missing".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.defences import RECIPES
from secure_export import registry, statistics
from secure_export.purifiers import Purifier

FOLDER = Path(__file__).parent
RESULTS, PUBLISHED = FOLDER / "results", FOLDER / "published.json"
MISSING = "missing"
ALPHA = 0.05
"""Of the exact two-sided interval that stands behind a single run."""
HEADER = ("attack", "network", "defence", "ACC ours", "ACC paper", "ASR ours", "ASR paper", "remark")

Counts = Mapping[str, Sequence[int]]
Present = frozenset[tuple[str, str]]
"""(name, sha256) of the models that tables are of."""
Row = Mapping[str, Any]
"""One published cell: what it says, and under `ours` what of ours answers it."""


@dataclass(frozen=True)
class Trial:
    """One purifier on one model, as measured."""

    model: str
    """Of the zoo; where it has one recipe of a published attack, the attack's name."""
    kind: str
    fit: int
    seed: int
    settings: Mapping[str, Counts]
    sha256: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Located:
    """What one locator said of one view of a backdoored model."""

    model: str
    locator: str
    right: bool


@click.command()
@click.option("--results", default=RESULTS, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--zoo",
    "builds",
    multiple=True,
    default=("zoo",),
    show_default=True,
    help="the build, by its cards in RESULTS/ZOO.json; given again, cells are means and ranges over all",
)
@click.option("--out", type=click.Path(path_type=Path), help="write here instead of printing")
def main(results: Path, builds: tuple[str, ...], out: Path | None) -> None:
    """Every table as Markdown. Of one build of the zoo what stands side by side was tried on one model."""
    present = frozenset(model for build in builds for model in models(results / f"{build}.json"))
    published = json.loads(PUBLISHED.read_text())
    found = (*trials(results, present), *rounded(results, present))
    text = "\n".join(document(published, found, tuple(located(results, present))))
    if out is None:
        click.echo(text)
    else:
        out.write_text(text + "\n")


def models(cards: Path) -> Iterator[tuple[str, str]]:
    """(name, sha256) of every model of a build."""
    if not cards.is_file():
        raise click.UsageError(
            f"no cards {cards}: python -m benchmarks.zoo_table --result {cards} writes them"
        )
    for name, card in json.loads(cards.read_text()).items():
        yield name, card["sha256"]


def trials(results: Path, present: Present) -> Iterator[Trial]:
    """Trials of benchmarks.defences on the zoo's present weights; a policy may ask for other parameters."""
    for path in sorted((results / "defences").glob("*.json")):
        found = json.loads(path.read_text())
        recipe = found["recipe"]
        model, fit, seed, sha256 = found["model"], found["fit"], found["seed"], found["sha256"]
        if (model, sha256) in present:
            yield Trial(model, recipe["kind"], fit, seed, found["settings"], sha256, recipe)
            yield Trial(model, "none", fit, seed, found["before"], sha256)


def rounded(results: Path, present: Present) -> Iterator[Trial]:
    """What benchmarks.rounding_cures measured of `efrap`, in the int8 file: it changes no other."""
    path = results / "rounding-cures.json"
    for place, found in json.loads(path.read_text()).items() if path.is_file() else ():
        model = Path(place).name
        if place != "versions" and (model, found["sha256"]) in present and "efrap" in found["rows"]:
            yield Trial(model, "efrap", 500, 0, {"int8-u8s8": found["rows"]["efrap"]}, found["sha256"])


def located(results: Path, present: Present) -> Iterator[Located]:
    """What the locators said of the zoo's present weights in benchmarks.locate_trials, view by view."""
    path = results / "locate.json"
    for place, found in json.loads(path.read_text())["models"].items() if path.is_file() else ():
        model = Path(place).name
        if found["dataset"] == "cifar10" and (model, found["sha256"]) in present:
            for row in found["rows"].values():
                for locator, said in row.get("locators", {}).items():
                    yield Located(model, locator, said["class"] == found["target_class"])


def document(published: Mapping[str, Any], found: Sequence[Trial], said: Sequence[Located]) -> Iterator[str]:
    """All tables, and how much of each is there."""
    yield "Percent. Ours: hits of n with the exact 95 % interval, or mean and range of runs (seeds, builds)."
    for table, title in published["titles"].items():
        rows = [row for row in published["rows"] if row["table"] == table]
        lines = [_line(row, rows, found, said) for row in rows]
        answered = sum(MISSING not in line[3:6:2] for line in lines)
        yield from ("", f"## {title}", "", f"{answered} of {len(rows)} rows have a number of ours.", "")
        yield _row(HEADER)
        yield _row(["---"] * len(HEADER))
        yield from map(_row, lines)


def _line(
    row: Mapping[str, Any], rows: Sequence[Row], found: Sequence[Trial], said: Sequence[Located]
) -> tuple[str, ...]:
    ours = row.get("ours")
    remark = row["note"]
    if ours is None:
        acc = asr = MISSING
    elif "mean_over" in ours:
        acc, asr = (_average(row, rows, found, key) for key in ("acc", "asr"))
    elif "locator" in ours:
        acc, asr = _localized(ours, said), "–"
    else:
        chosen = matching(ours, found)
        acc, asr = (
            cell([trial.settings[ours["setting"]][key] for trial in chosen]) for key in ("acc", "asr")
        )
        if chosen and isinstance(ours.get("fit"), list):
            remark = "; ".join(filter(None, (remark, f"ours: {chosen[0].fit} samples")))
    return (
        row["attack"],
        row["network"],
        row["defence"],
        acc,
        _paper(row["acc"]),
        asr,
        _paper(row["asr"]),
        remark,
    )


def _average(row: Row, rows: Sequence[Row], found: Sequence[Trial], key: str) -> str:
    """Over the attacks that have a number of ours, and how many those are."""
    attacks = row["ours"]["mean_over"]
    rates = []
    for other in rows:
        if other["attack"] in attacks and (other["defence"], other["network"]) == (
            row["defence"],
            row["network"],
        ):
            counts = [
                trial.settings[other["ours"]["setting"]][key] for trial in matching(other["ours"], found)
            ]
            if counts:
                rates.append(sum(100 * hits / total for hits, total in counts) / len(counts))
    return f"{sum(rates) / len(rates):.2f} ({len(rates)} of {len(attacks)} attacks)" if rates else MISSING


def _localized(ours: Mapping[str, Any], said: Iterable[Located]) -> str:
    answers = [s.right for s in said if s.model == ours["model"] and s.locator == ours["locator"]]
    return cell([[sum(answers), len(answers)]]) if answers else MISSING


def matching(ours: Mapping[str, Any], found: Sequence[Trial]) -> list[Trial]:
    """Trials that answer a published cell; of several sizes of fit, the first that is there."""
    sizes = ours["fit"] if isinstance(ours["fit"], list) else [ours["fit"]]
    wanted = ours.get("parameters", {})
    for size in sizes:
        chosen = [
            trial
            for trial in found
            if (trial.model, trial.kind) == (ours["model"], ours["kind"])
            and (trial.fit == size or trial.kind == "none")
            and ours["setting"] in trial.settings
            and as_asked(trial, wanted)
        ]
        if chosen and ours["kind"] == "none":
            # An untouched model is the same in every trial: one reading, the last, from the most samples.
            chosen.sort(key=lambda trial: trial.settings[ours["setting"]]["acc"][1])
            return list({trial.sha256: trial for trial in chosen}.values())
        if chosen:
            return chosen
    return []


def as_asked(trial: Trial, wanted: Mapping[str, Any]) -> bool:
    """Whether the parameters are the wanted ones, and all others those of benchmarks.defences."""
    given = {key: value for key, value in trial.parameters.items() if key != "kind"}
    if not given:
        return not wanted
    usual = registry.build(Purifier, "purifiers", {"kind": trial.kind, **RECIPES[trial.kind], **wanted})
    fields = usual.model_dump(mode="json")
    return all(fields.get(key) == value for key, value in given.items())


def cell(counts: Sequence[Sequence[int]]) -> str:
    """`0.99 [0.80, 1.22], n 9000` for one count, `0.99 (0.7 to 1.2, 3 seeds)` for several."""
    if not counts:
        return MISSING
    rates = [100 * hits / total for hits, total in counts]
    if len(rates) > 1:
        return f"{sum(rates) / len(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}, {len(rates)} runs)"
    hits, total = counts[0]
    low, high = (100 * bound(hits, total, ALPHA / 2) for bound in (statistics.lower, statistics.upper))
    return f"{rates[0]:.2f} [{low:.2f}, {high:.2f}], n {total}"


def _paper(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
