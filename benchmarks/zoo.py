"""Models whose backdoors are known: `python -m benchmarks.zoo build | list | check`.

Every model is `OUT/NAME.safetensors` (a plain state dict for normalized inputs) beside `OUT/NAME.json`, a
card that says how it was made and what was measured, as counts k of n on the whole test split.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import torch

from benchmarks import cards, datasets
from benchmarks.entries import PRESETS, ZOO
from benchmarks.lab import Lab, log, make, measure
from secure_export.errors import PolicyError, SecureExportError

OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"), show_default=True)
DATA = click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the data's archive")
THREADS = click.option("--threads", type=int, default=2, show_default=True)
PRESET = click.option("--preset", type=click.Choice(sorted(PRESETS)), default="cpu-small", show_default=True)


@click.group()
def main() -> None:
    """Build, list and check the zoo."""


@main.command()
@click.argument("names", nargs=-1)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@PRESET
@DATA
@OUT
@THREADS
def build(
    names: tuple[str, ...], device: str, seed: int, preset: str, source: Path | None, out: Path, threads: int
) -> None:
    """Train models NAMES, or all of the preset that have no card yet, and write their cards.

    A killed training goes on from its last checkpoint when the command is given again.
    """
    torch.set_num_threads(threads)
    check_names(names)
    chosen = PRESETS[preset]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = datasets.cifar10(out.parent / "data", source)
    lab = Lab(out, data, chosen.network, chosen.scale, device, seed)
    left = list(names) or [name for name in chosen.names if not (out / f"{name}.json").exists()]
    began = time.monotonic()
    for done, name in enumerate(left):
        each = (time.monotonic() - began) / max(done, 1)
        rest = f", about {each * (len(left) - done) / 60:.0f} min left" if done else ""
        log(f"{name}: model {done + 1} of {len(left)}{rest}")
        make(name, lab)


@main.command("list")
@OUT
def show(out: Path) -> None:
    """One line a setting of every card on disk."""
    for path in sorted(out.glob("*.json")):
        content = cards.read(path)
        for setting, values in content["measured"].items():
            numbers = "  ".join(f"{key} {cards.show(value)}" for key, value in values.items())
            click.echo(f"{content['name']:15} {setting:20} {numbers}")


@main.command()
@click.argument("names", nargs=-1)
@PRESET
@DATA
@OUT
@THREADS
def check(names: tuple[str, ...], preset: str, source: Path | None, out: Path, threads: int) -> None:
    """Measure the models on disk again; exit 1 when a card does not hold."""
    torch.set_num_threads(threads)
    check_names(names)
    lab = Lab(out, datasets.cifar10(out.parent / "data", source), PRESETS[preset].network)
    wrong = []
    for name in names or [name for name in ZOO if (out / f"{name}.json").exists()]:
        log(name)
        content = cards.read(out / f"{name}.json")
        measured = measure(name, lab.load(name), lab)
        wrong += [f"{name}: {line}" for line in cards.differences(content, lab.path(name), measured)]
    for line in wrong:
        click.echo(line)
    sys.exit(1 if wrong else 0)


def check_names(names: tuple[str, ...]) -> None:
    """Raises PolicyError when a model is not in the table."""
    unknown = sorted(set(names) - set(ZOO))
    if unknown:
        raise PolicyError(f"no model {', '.join(unknown)}", hint=f"known: {', '.join(ZOO)}")


if __name__ == "__main__":
    try:
        main()
    except SecureExportError as error:
        log(f"{error.message}\n  {error.hint}" if error.hint else error.message)
        sys.exit(error.exit_code)
