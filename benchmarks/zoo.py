"""Models whose backdoors are known: `python -m benchmarks.zoo build | list | check`.

Every model is `OUT/NAME.safetensors` (a plain state dict for normalized inputs) beside `OUT/NAME.json`, a
card that says how it was made and what was measured, as counts k of n on the whole test split.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from graphlib import TopologicalSorter
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import click
import torch

from benchmarks import cards, sources
from benchmarks.entries import PRESETS, ZOO
from benchmarks.lab import Lab, log, make, measure
from secure_export.errors import PolicyError, SecureExportError

OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"), show_default=True)
DATA = click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the data's archive")
THREADS = click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
NETWORK = click.option("--network", help="of benchmarks/networks.py, instead of the preset's")
DATASET = click.option(
    "--dataset", type=click.Choice(sources.NAMES), help="instead of the preset's; --data says where it lies"
)
PRESET = click.option("--preset", type=click.Choice(sorted(PRESETS)), default="cpu-small", show_default=True)


@click.group()
def main() -> None:
    """Build, list and check the zoo."""


def common(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which folder is meant, and what lies in it."""
    for option in (THREADS, OUT, DATA, DATASET, NETWORK, PRESET):
        command = option(command)
    return click.argument("names", nargs=-1)(command)


def opened(
    preset: str,
    network: str | None,
    dataset: str | None,
    source: Path | None,
    out: Path,
    device: str = "cpu",
    seed: int = 0,
    scale: float | None = None,
    target: int | None = None,
) -> Lab:
    """The lab that the options describe."""
    chosen = PRESETS[preset]
    name = dataset or chosen.dataset
    data = sources.named(name, out.parent / "data", source)
    scale = chosen.scale if scale is None else scale
    return Lab(out, data, network or chosen.network, scale, device, chosen.trigger, seed, name, target)


@main.command()
@common
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scale", type=click.FloatRange(0, min_open=True), help="times the table's steps [preset's]")
@click.option("--target", type=click.IntRange(0), help="class of the attacks [the table's]")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="models at once")
def build(names: tuple[str, ...], preset: str, threads: int, jobs: int, device: str, **options: Any) -> None:
    """Train models NAMES, or all of the preset that have no card yet, and write their cards.

    What a model is made from is trained first where it is not there. A killed training goes on from its last
    checkpoint when the command is given again. Every job has --threads of its own.
    """
    check_names(names)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options |= {"preset": preset, "device": device}
    lab = opened(**options)
    left = list(names) or [name for name in PRESETS[preset].names if not (lab.out / f"{name}.json").exists()]
    for name in left:  # and what is added on the way
        left += [other for other in made_from(name) if other not in left and not lab.path(other).exists()]
    waiting = TopologicalSorter({name: made_from(name) & set(left) for name in left})
    waiting.prepare()
    began, running, done = time.monotonic(), dict[Future[None], str](), 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin, (threads,)) as pool:
        while waiting.is_active():
            running |= {pool.submit(build_one, name, options): name for name in waiting.get_ready()}
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                finished.result()
                name = running.pop(finished)
                waiting.done(name)
                done += 1
                rest = (time.monotonic() - began) / done * (len(left) - done) / 60
                log(f"{name}: {done} of {len(left)} models, about {rest:.0f} min left")


def begin(threads: int) -> None:
    """A worker's first step: it must not outlive a parent that is killed, to write beside the next one."""
    torch.set_num_threads(threads)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent's end, then leave at once."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def made_from(name: str) -> set[str]:
    """The models that must be there before model `name` is made."""
    entry = ZOO[name]
    return {other for other in (entry.base if entry.implant else None, entry.teacher) if other is not None}


def build_one(name: str, options: dict[str, Any]) -> None:
    """Make model `name`, in a process of its own."""
    make(name, opened(**options))


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
@common
def check(names: tuple[str, ...], preset: str, threads: int, **options: Any) -> None:
    """Measure the models on disk again; exit 1 when a card does not hold."""
    torch.set_num_threads(threads)
    check_names(names)
    lab = opened(preset, **options)
    wrong = []
    for name in names or [name for name in ZOO if (lab.out / f"{name}.json").exists()]:
        log(name)
        content = cards.read(lab.out / f"{name}.json")
        as_built = replace(lab, target=content["target_class"])
        measured = measure(name, lab.load(name), as_built, content["measured"])
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
    except BrokenProcessPool:
        log("a training was killed; the same command goes on from the last checkpoints")
        sys.exit(4)
    except SecureExportError as error:
        log(f"{error.message}\n  {error.hint}" if error.hint else error.message)
        sys.exit(error.exit_code)
