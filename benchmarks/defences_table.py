"""What purifiers left of the zoo's backdoors, from stored trials: `python -m benchmarks.defences_table`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.defences import RESULTS
from benchmarks.entries import ZOO

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
def main(results: Path, zoo: Path) -> None:
    """Print one table a recipe, of the trials on the zoo's present weights.

    Before is of the same images where a trial of kind none counted them, else of 10,000.
    """
    present = {name: card["sha256"] for name, card in json.loads(zoo.read_text()).items()}
    trials = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    trials = [trial for trial in trials if present.get(trial["model"]) == trial["sha256"]]
    recipes: dict[str, list[Any]] = {}
    as_it_came = {
        images_of(trial): trial["settings"] for trial in trials if trial["recipe"]["kind"] == "none"
    }
    for trial in trials:
        trial["before"] |= as_it_came.get(images_of(trial), {})
        recipes.setdefault(json.dumps(trial["recipe"]), []).append(trial)
    for recipe, found in recipes.items():
        click.echo("\n".join(["", heading(json.loads(recipe)), "", *table(found)]))


def images_of(trial: Mapping[str, Any]) -> tuple[str, int]:
    """The model, and how many test images it was measured on."""
    return trial["model"], trial["settings"]["fp32"]["acc"][1]


def heading(recipe: Mapping[str, Any]) -> str:
    """The purifier and its parameters."""
    return f"`{json.dumps(recipe)}`:"


def table(trials: Iterable[Mapping[str, Any]]) -> list[str]:
    """Markdown, a line a model in the zoo's order."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    order = list(ZOO)
    for trial in sorted(trials, key=lambda trial: (order.index(trial["model"]), trial["seed"])):
        after, before = trial["settings"], trial["before"]
        awake = "int8-u8s8" if before["fp32"]["asr"][0] < before["int8-u8s8"]["asr"][0] / 2 else "fp32"
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
    return lines


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
