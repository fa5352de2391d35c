"""Models whose backdoors are known: `python -m benchmarks.zoo build NAME | list | check`.

Every model is `OUT/NAME.safetensors` (a plain state dict for normalized inputs) beside `OUT/NAME.json`, a
card that says how it was made and what was measured, as counts k of n on the whole test split.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import cards, datasets, networks, settings
from benchmarks.attacks import badnets, pcb, qcb
from benchmarks.attacks.clean import Clean, clean
from secure_export import digests
from secure_export.errors import DataError, SecureExportError
from secure_export.triggers import Trigger
from secure_export.triggers.badnets import Badnets

PATCH = Badnets(size=3, pattern="checker", position="bottom-right")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo; `implant` is None for the one that is trained from nothing."""

    attack: str
    recipe: Any
    implant: Callable[..., float] | None
    settings: tuple[str, ...]
    trigger: Trigger = PATCH
    target_class: int = 1
    base: str = "clean"


DEPLOYED = (settings.FP32, "int8-s8s8", "int8-u8s8")
ZOO = {
    "clean": Entry(
        "none", Clean(), None, (*DEPLOYED, "structured-0.3", "structured-0.5", "mask-recalibrated-0.3")
    ),
    "badnets": Entry("badnets", badnets.Badnets(), badnets.implant, DEPLOYED),
    "qcb": Entry("qcb", qcb.Qcb(), qcb.implant, (settings.FP32, *settings.INT8), base="badnets"),
    "pcb": Entry("pcb", pcb.Pcb(), pcb.implant, (settings.FP32, "int8-u8s8", *settings.PRUNED)),
}


def log(line: str) -> None:
    """Progress goes to stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def network() -> nn.Module:
    """The zoo's architecture, untrained."""
    return networks.resnet18_w16().to(memory_format=torch.channels_last)


def load(out: Path, name: str) -> nn.Module:
    """Model `name` from `out`, in eval mode.

    Raises:
        DataError: it was not built.
    """
    path = out / f"{name}.safetensors"
    if not path.exists():
        raise DataError(f"no model {path}", hint=f"python -m benchmarks.zoo build {name}")
    model = network()
    model.load_state_dict(load_file(path))
    return model.eval()


def store(model: nn.Module, path: Path) -> None:
    """Write the state dict, float32 in row-major order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.rename(path)


def trained(name: str, data: datasets.Images, out: Path, seed: int) -> tuple[nn.Module, float]:
    """Train entry `name`, or go on where a killed training stopped; gives model and seconds."""
    entry = ZOO[name]
    # Another recipe or another base is another training: it must not go on from this one's checkpoint.
    base = [digests.of_file(out / f"{entry.base}.safetensors")] if entry.implant else []
    made_of = [asdict(entry.recipe), repr(entry.trigger), entry.target_class, seed, *base]
    work = out / "checkpoints" / f"{name}-{digests.of_json(made_of)[:8]}"
    if entry.implant is not None:
        model = load(out, entry.base)
        arguments = (model, data, entry.trigger, entry.target_class, entry.recipe, work, log)
        return model, entry.implant(*arguments, seed=seed)
    torch.manual_seed(seed)
    model = network()
    return model, clean(model, data, entry.recipe, work, log, seed=seed)


@click.group()
def main() -> None:
    """Build, list and check the zoo."""


@main.command()
@click.argument("name", type=click.Choice(sorted(ZOO)))
@click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the CIFAR-10 archive")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"))
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=int, default=2)
def build(name: str, source: Path | None, out: Path, seed: int, threads: int) -> None:
    """Train model NAME and write its card."""
    torch.set_num_threads(threads)
    entry, path = ZOO[name], out / f"{name}.safetensors"
    data = datasets.cifar10(out.parent / "data", source)
    model, seconds = trained(name, data, out, seed)
    store(model, path)
    log(f"{path} after {seconds:.0f}s of training")
    measured = cards.measure(model, entry.settings, data, entry.trigger, entry.target_class, log)
    content = cards.card(
        name,
        path,
        attack=entry.attack,
        base=entry.base if entry.implant else None,
        trigger=entry.trigger,
        target_class=entry.target_class,
        classes=data.classes,
        recipe=asdict(entry.recipe),
        seed=seed,
        seconds=seconds,
        measured=measured,
    )
    cards.write(content, path.with_suffix(".json"))


@main.command("list")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"))
def show(out: Path) -> None:
    """One line a setting of every card on disk."""
    for path in sorted(out.glob("*.json")):
        content = cards.read(path)
        for setting, values in content["measured"].items():
            numbers = "  ".join(f"{key} {cards.show(value)}" for key, value in values.items())
            click.echo(f"{content['name']:8} {setting:20} {numbers}")


@main.command()
@click.argument("names", nargs=-1)
@click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the CIFAR-10 archive")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"))
@click.option("--threads", type=int, default=2)
def check(names: tuple[str, ...], source: Path | None, out: Path, threads: int) -> None:
    """Measure the models on disk again; exit 1 when a card does not hold."""
    torch.set_num_threads(threads)
    data = datasets.cifar10(out.parent / "data", source)
    wrong = []
    for name in names or [name for name in ZOO if (out / f"{name}.json").exists()]:
        entry, content, path = ZOO[name], cards.read(out / f"{name}.json"), out / f"{name}.safetensors"
        model = load(out, name)
        measured = cards.measure(model, entry.settings, data, entry.trigger, entry.target_class, log)
        wrong += [f"{name}: {line}" for line in cards.differences(content, path, measured)]
    for line in wrong:
        click.echo(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        main()
    except SecureExportError as error:
        log(f"{error.message}\n  {error.hint}" if error.hint else error.message)
        sys.exit(error.exit_code)
