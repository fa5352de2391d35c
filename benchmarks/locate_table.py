"""False alarms and hits of the locators from stored trials: `python -m benchmarks.locate_table`.

With --together one table instead: every model with what each locator named in any of its files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.entries import ZOO
from benchmarks.locate_trials import RESULT
from benchmarks.zoo_table import state
from secure_export import statistics
from secure_export.records.measured import ALWAYS_NAMES, MIN_SCORE, UNREAD

ALPHA = 0.05
"""Of the exact one-sided bound on a rate of false alarms."""
Row = tuple[str, str, str, Mapping[str, Any], Mapping[str, Any]]
"""Model, setting, locator, the model's record, the answer."""


@click.command()
@click.option(
    "--result", "results", multiple=True, type=click.Path(exists=True, path_type=Path), default=(RESULT,)
)
@click.option("--together", "as_one", is_flag=True, help="all locators of all results, model by model")
def main(results: tuple[Path, ...], as_one: bool) -> None:
    """Print the tables of docs/locators.md."""
    answers = [row for result in results for row in rows(json.loads(result.read_text())["models"])]
    for part in (together,) if as_one else (false_alarms, by_setting, each_alarm, hits):
        for line in (*part(answers), ""):
            click.echo(line)


def rows(models: Mapping[str, Any]) -> Iterator[Row]:
    """Every answer of every locator."""
    for name, model in models.items():
        for setting, measured in model["rows"].items():
            for locator, answer in measured.get("locators", {}).items():
                yield name, setting, locator, model, answer


def false_alarms(answers: list[Row]) -> Iterator[str]:
    """By locator and data: clean models and their files on which it is silent, with exact bounds."""
    yield "| locator | data | clean models, silent on every file | bound | files, silent | bound | unread |"
    yield "|---|---|---|---|---|---|---|"
    clean = [row for row in answers if row[3]["attack"] == "none"]
    for locator in sorted({row[2] for row in clean}):
        for dataset in (*sorted({row[3]["dataset"] for row in clean}), "all"):
            mine = [row for row in clean if row[2] == locator and dataset in (row[3]["dataset"], "all")]
            read = [row for row in mine if UNREAD not in row[4]["evidence"]]
            loud = {row[0] for row in read if row[4]["class"] is not None}
            cells = [locator, dataset, silent(len(loud), len({row[0] for row in read}))]
            cells.append(silent(sum(row[4]["class"] is not None for row in read), len(read)))
            yield f"| {' | '.join(cells)} | {len(mine) - len(read)} |"


def by_setting(answers: list[Row]) -> Iterator[str]:
    """By locator and setting: clean files on which it is silent."""
    yield "| locator | setting | files, silent | bound |"
    yield "|---|---|---|---|"
    clean = [row for row in answers if row[3]["attack"] == "none" and UNREAD not in row[4]["evidence"]]
    for locator, setting in sorted({(row[2], row[1]) for row in clean}):
        mine = [row for row in clean if (row[2], row[1]) == (locator, setting)]
        alarms = sum(row[4]["class"] is not None for row in mine)
        yield f"| {locator} | {setting} | {silent(alarms, len(mine))} |"


def silent(alarms: int, total: int) -> str:
    """Silent ones of all, and the exact upper bound on the rate of false alarms."""
    bound = statistics.upper(alarms, total, ALPHA)
    return f"{total - alarms}/{total} | {100 * bound:.1f} %"


def each_alarm(answers: list[Row]) -> Iterator[str]:
    """Every false alarm of a locator that can be silent."""
    for name, setting, locator, model, answer in answers:
        if model["attack"] == "none" and answer["class"] is not None and not always(answer):
            acc = model["rows"][setting]["acc"]
            told = {
                key: value
                for key, value in answer["evidence"].items()
                if isinstance(value, float) and key != MIN_SCORE
            }
            numbers = ", ".join(f"{key} {value:.2f}" for key, value in told.items())
            share = f"ACC {100 * acc[0] / acc[1]:.1f}"
            yield f"- `{locator}` on {name} {setting} ({share}): class {answer['class']}, {numbers}"


def always(answer: Mapping[str, Any]) -> bool:
    """Whether the locator names a class whatever it sees."""
    return bool(answer["evidence"].get(ALWAYS_NAMES))


def hits(answers: list[Row]) -> Iterator[str]:
    """By attack, state and locator: files on which the target, nothing, or another class is named."""
    yield "| data | attack | backdoor | locator | target named | none | another class | unread |"
    yield "|---|---|---|---|---|---|---|---|"
    counted: dict[tuple[str, ...], Counter[str]] = {}
    for _, setting, locator, model, answer in answers:
        truth = model["rows"][setting]
        if model["attack"] == "none" or "asr" not in truth:
            continue
        key = (model["dataset"], model["attack"], state(truth), locator)
        counted.setdefault(key, Counter())[outcome(answer, model["target_class"])] += 1
    for cells, counts in sorted(counted.items()):
        kinds = (counts[kind] for kind in ("target", "none", "another", "unread"))
        yield f"| {' | '.join(cells)} | {' | '.join(map(str, kinds))} |"


def together(answers: list[Row]) -> Iterator[str]:
    """By model: the classes that each locator named, and whether a planted one is among them."""
    locators = sorted({row[2] for row in answers})
    yield f"| model | {' | '.join(f'`{locator}`' for locator in locators)} | planted class named |"
    yield "|---" * (len(locators) + 2) + "|"
    named: dict[str, dict[str, set[int]]] = {}
    for name, _, locator, model, answer in answers:
        if model["attack"] != "none":
            classes = named.setdefault(name, {}).setdefault(locator, set())
            classes |= {answer["class"]} - {None}
    right = []
    for name, by in named.items():
        entry = ZOO.get(name.partition("/")[2])
        target = next(row[3]["target_class"] for row in answers if row[0] == name)
        planted = {target} | ({entry.second[1]} if entry and entry.second else set())
        right.append(bool(planted & set().union(*by.values())))
        cells = [", ".join(map(str, sorted(by[one]))) or "none" if one in by else "–" for one in locators]
        cells = [name.partition("/")[2] or name, *cells, "yes" if right[-1] else "**no**"]
        yield f"| {' | '.join(cells)} |"
    low = statistics.lower(sum(right), len(right), ALPHA) if right else 0.0
    yield ""
    yield f"Named by one of them: {sum(right)} of {len(right)} (at least {100 * low:.1f} %)."


def outcome(answer: Mapping[str, Any], target_class: int) -> str:
    """What an answer is worth."""
    if UNREAD in answer["evidence"]:
        return "unread"
    if answer["class"] is None:
        return "none"
    return "target" if answer["class"] == target_class else "another"


if __name__ == "__main__":
    main()
