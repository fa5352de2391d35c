"""The zoo's cards as one result and one table, attack by toolchain: `python -m benchmarks.zoo_table`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks import cards, measuring, stored

RESULT = Path(__file__).parent / "results" / "zoo.json"
RUIN = 0.2
"""A file that is right on a smaller share of the images has no backdoor to speak of."""


@click.command()
@click.option("--out", type=click.Path(exists=True, path_type=Path), default=Path("build/zoo"))
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(out: Path, result: Path) -> None:
    """Write every card of OUT to benchmarks/results/zoo.json and print the rows of docs/attacks.md."""
    found = [cards.read(path) for path in sorted(out.glob("*.json"))]
    found.sort(key=lambda card: (card["name"] != "clean", card["name"]))
    stored.write({card["name"]: card for card in found}, result)
    click.echo("| model | setting | ACC | ASR | without the trigger | state |")
    click.echo("|---|---|---|---|---|---|")
    for card in found:
        for setting, values in card["measured"].items():
            planted = state(values) if card["attack"] != "none" else "control"
            click.echo(row(card["name"], setting, values, planted))


def row(name: str, setting: str, values: dict[str, list[int]], planted: str) -> str:
    """One line; further counts (other classes, a second trigger) stand behind the ASR."""
    more = [f"{key} {percent(value)}" for key, value in values.items() if key not in ("acc", "asr", "ftr")]
    asr = ", ".join([percent(values["asr"]), *more])
    cells = [name, setting, percent(values["acc"]), asr, percent(values["ftr"]), planted]
    return f"| {' | '.join(cells)} |"


def state(values: dict[str, list[int]]) -> str:
    """Awake where nearly all samples follow the trigger.

    Lift, not ASR: a network that pruning has collapsed onto the target has one without any backdoor. And of
    one that knows next to nothing any more neither says anything.
    """
    if values["acc"][0] < RUIN * values["acc"][1]:
        return "ruin"
    lift = values["asr"][0] / values["asr"][1] - values["ftr"][0] / values["ftr"][1]
    return measuring.state(lift, measuring.NEARLY_ALL)


def percent(count: list[int]) -> str:
    """k of n in percent."""
    return f"{100 * count[0] / count[1]:.2f} %"


if __name__ == "__main__":
    main()
