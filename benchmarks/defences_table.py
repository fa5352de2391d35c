"""What purifiers left of the zoo's backdoors, from stored trials: `python -m benchmarks.defences_table`.

One table a recipe, or with --vary one line a recipe of one purifier: what its fields are worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from benchmarks.defences import RESULTS
from benchmarks.entries import ZOO
from secure_export import registry
from secure_export.purifiers import Purifier

TRADITIONAL = (
    "badnets",
    "blended",
    "wanet",
    "sig",
    "lf",
    "trojan",
    "cl",
    "dynamic",
    "lira",
    "ssba",
    "dfst",
    "sig-clean-label",
)
"""Awake in full precision, one target for all classes, and no knowledge of the defence."""
COLUMNS = (
    "model",
    "ACC before",
    "ACC after, fp32 / int8",
    "ASR before",
    "ASR after, fp32",
    "ASR after, int8",
    "without the trigger",
    "ASR elsewhere",
    "CPU s",
)


@click.command()
@click.option("--results", default=RESULTS, type=click.Path(exists=True, path_type=Path))
@click.option("--zoo", default=Path("benchmarks/results/zoo.json"), type=click.Path(path_type=Path))
@click.option("--vary", help="one table of this purifier instead: a line for what differs from its defaults")
def main(results: Path, zoo: Path, vary: str | None) -> None:
    """Print one table a recipe, number of samples and seed, of the trials on the zoo's present weights.

    Before is of the same images where a trial of kind none counted them, else of 10,000.
    """
    present = {name: card["sha256"] for name, card in json.loads(zoo.read_text()).items()}
    trials = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    trials = [trial for trial in trials if present.get(trial["model"]) == trial["sha256"]]
    if vary:
        click.echo("\n".join(varied([trial for trial in trials if trial["recipe"]["kind"] == vary])))
        return
    alike: dict[tuple[str, int, int], list[Any]] = {}
    as_it_came = {
        images_of(trial): trial["settings"] for trial in trials if trial["recipe"]["kind"] == "none"
    }
    for trial in trials:
        trial["before"] |= as_it_came.get(images_of(trial), {})
        alike.setdefault((json.dumps(trial["recipe"]), trial["fit"], trial["seed"]), []).append(trial)
    for (recipe, fit, seed), found in alike.items():
        click.echo("\n".join(["", f"`{recipe}`, {fit} samples, seed {seed}:", "", *table(found)]))


def images_of(trial: Mapping[str, Any]) -> tuple[str, int]:
    """The model, and how many test images it was measured on."""
    return trial["model"], trial["settings"]["fp32"]["acc"][1]


def table(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, a line a model in the zoo's order."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    order = list(ZOO)
    for trial in sorted(trials, key=lambda trial: (order.index(trial["model"]), trial["seed"])):
        after, before = trial["settings"], trial["before"]
        awake = awake_in(before)
        cells = [
            f"`{trial['model']}`",
            percent(before[awake]["acc"]),
            f"{percent(after['fp32']['acc'])} / {percent(after['int8-u8s8']['acc'])}",
            f"{percent(before[awake]['asr'])}{'' if awake == 'fp32' else ' (int8)'}",
            counted(after["fp32"]["asr"]),
            counted(after["int8-u8s8"]["asr"]),
            percent(after["fp32"]["ftr"]),
            elsewhere(after),
            f"{trial['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + average([trial for trial in trials if trial["model"] in TRADITIONAL])


def average(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line with the means over traditional attacks, every model weighing the same; none for one alone."""
    if len(trials) < 2:
        return []

    def mean(when: str, setting: str, count: str) -> float:
        return 100 * fmean(
            trial[when][setting][count][0] / trial[when][setting][count][1] for trial in trials
        )

    cells = [
        f"mean of {len(trials)} traditional",
        f"{mean('before', 'fp32', 'acc'):.2f}",
        " / ".join(f"{mean('settings', setting, 'acc'):.2f}" for setting in ("fp32", "int8-u8s8")),
        f"{mean('before', 'fp32', 'asr'):.2f}",
        *(f"{mean('settings', setting, 'asr'):.2f}" for setting in ("fp32", "int8-u8s8")),
        f"{mean('settings', 'fp32', 'ftr'):.2f}",
        "",
        f"{fmean(trial['cpu_seconds'] for trial in trials):.0f}",
    ]
    return [f"| {' | '.join(cells)} |"]


def awake_in(before: Mapping[str, Any]) -> str:
    """The setting in which to look: int8 where the trigger wakes there alone."""
    return "int8-u8s8" if before["fp32"]["asr"][0] < before["int8-u8s8"]["asr"][0] / 2 else "fp32"


def varied(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, a line for every difference from the defaults, size of fit and seed; a column a model.

    A model of which nothing was varied has none. If the trigger wakes in int8 alone, a cell is of that file.
    """
    found: dict[tuple[str, int, int], dict[str, str]] = {}
    for trial in trials:
        awake, after = awake_in(trial["before"]), trial["settings"]
        line = found.setdefault((difference(trial["recipe"]), trial["fit"], trial["seed"]), {})
        line[trial["model"]] = f"{percent(after[awake]['acc'])} / {percent(after[awake]['asr'])}"
    models = [name for name in ZOO if sum(name in line for line in found.values()) > 1]
    heads = ["differs by", "samples", "seed", *(f"`{name}`, ACC / ASR" for name in models)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (what, fit, seed), line in sorted(found.items(), key=lambda item: (item[0][1:], item[0][0])):
        if not line.keys() & set(models):
            continue
        cells = [what or "nothing", str(fit), str(seed), *(line.get(name, "") for name in models)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference(recipe: Mapping[str, Any]) -> str:
    """The fields that are not the purifier's present defaults: `alpha 0, m1 10`."""
    defaults = registry.build(Purifier, "purifiers", {"kind": recipe["kind"]}).model_dump(mode="json")
    other = {name: value for name, value in recipe.items() if name != "kind" and value != defaults.get(name)}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in other.items()
    )


def elsewhere(after: Mapping[str, Any]) -> str:
    """Of a second backdoor, and of pruned settings: a row must not look cured for want of a column."""
    found = [f"second trigger {percent(counts)}"] if (counts := after["fp32"].get("asr-second")) else []
    found += [
        f"{name} {percent(counts['asr'])}"
        for name, counts in after.items()
        if name not in ("fp32", "int8-u8s8")
    ]
    return ", ".join(found)


def percent(count: Sequence[int]) -> str:
    """k of n in percent."""
    return f"{100 * count[0] / count[1]:.1f}"


def counted(count: Sequence[int]) -> str:
    """k of n, and in percent."""
    return f"{count[0]}/{count[1]} ({percent(count)})"


if __name__ == "__main__":
    main()
