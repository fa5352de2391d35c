"""Dozens of clean networks, and a few with a backdoor: `python -m benchmarks.clean_models`.

Whatever searches for backdoors is run on them to see how often it cries wolf. OUT/DATA-NETWORK-SEED holds
each as the zoo stores its models; a killed command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks import cards, sources
from benchmarks.entries import PRESETS
from benchmarks.lab import Lab, log, make


@dataclass(frozen=True)
class Fleet:
    """Clean trainings on a preset's data, one a seed; the first `backdoored` of them also with its attack."""

    preset: str
    network: str
    seeds: range
    backdoored: int


FLEETS = (
    Fleet("digits", "cnn", range(56), 3),
    Fleet("digits", "resnet18_w8", range(24), 2),
    Fleet("speech", "keywords", range(2), 1),
    Fleet("cpu-tiny", "resnet18_w8", range(20), 1),
    Fleet("cpu-tiny", "cnn", range(10), 2),
    Fleet("cpu-tiny", "resnet18_w16", range(10, 30), 0),
)
"""The cheapest first. The last is the zoo's network, from seeds that no build has."""


def wanted(fleet: Fleet, out: Path, cache: Path, source: Path | None) -> Iterator[tuple[Lab, str]]:
    """(lab, name) of every model of the fleet; a backdoored one after the clean one that it starts from."""
    preset = PRESETS[fleet.preset]
    data = sources.named(preset.dataset, cache, source)
    for place, seed in enumerate(fleet.seeds):
        folder = out / f"{preset.dataset}-{fleet.network}-{seed}"
        lab = Lab(folder, data, fleet.network, preset.scale, "cpu", preset.trigger, seed, preset.dataset)
        for name in preset.names if place < fleet.backdoored else preset.names[:1]:
            yield lab, name


@click.command()
@click.option("--out", default="build/clean", type=click.Path(path_type=Path), show_default=True)
@click.option("--cache", default="build/data", type=click.Path(path_type=Path), show_default=True)
@click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the archives")
@click.option("--preset", type=click.Choice([fleet.preset for fleet in FLEETS]), help="this one only")
@click.option("--network", type=click.Choice([fleet.network for fleet in FLEETS]), help="this one only")
def main(out: Path, cache: Path, source: Path | None, preset: str | None, network: str | None) -> None:
    """Train, measure and describe every model that has no card yet; one line a model on disk."""
    torch.set_num_threads(1)
    for fleet in FLEETS:
        if preset not in (None, fleet.preset) or network not in (None, fleet.network):
            continue
        for lab, name in wanted(fleet, out, cache, source):
            path = lab.path(name).with_suffix(".json")
            if not path.exists():
                log(f"{path.parent.name}/{name}")
                make(name, lab)
            click.echo(line(path))


def line(path: Path) -> str:
    """A card in a line: accuracy by setting, and the success of its trigger where it has one."""
    card = cards.read(path)
    keys = ("acc",) if card["base"] is None else ("acc", "asr")
    numbers = (
        f"{setting} " + " ".join(f"{key} {100 * values[key][0] / values[key][1]:.1f}" for key in keys)
        for setting, values in card["measured"].items()
    )
    return f"{path.parent.name}/{path.stem}: " + "; ".join(numbers)


if __name__ == "__main__":
    main()
