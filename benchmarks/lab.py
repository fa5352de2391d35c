"""One model of the zoo from the table to the card: train, store, measure, describe, load again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import cards, datasets, generated, networks, stored
from benchmarks.attacks._poison import Apply
from benchmarks.attacks.clean import clean
from benchmarks.entries import ZOO, scaled
from secure_export import digests
from secure_export.errors import DataError
from secure_export.triggers import Trigger
from secure_export.triggers.custom import Custom


@dataclass(frozen=True)
class Lab:
    """What all models of one folder share."""

    out: Path
    data: datasets.Images
    network: str = "resnet18_w16"
    scale: float = 1.0
    """How many times the steps of the table's recipes are trained."""
    device: str = "cpu"
    tone: Trigger | None = None
    """In place of the table's triggers, where the inputs are no images."""
    seed: int = 0
    dataset: str = "cifar10"
    target: int | None = None
    """In place of the table's target class."""

    def target_class(self, name: str) -> int:
        """The class that model `name` is to answer where the trigger is."""
        return ZOO[name].target_class if self.target is None else self.target

    def path(self, name: str) -> Path:
        """Where model `name` lies."""
        return self.out / f"{name}.safetensors"

    def untrained(self) -> nn.Module:
        """The network with the weights that `seed` gives."""
        torch.manual_seed(self.seed)
        model = networks.named(self.network, len(self.data.classes))
        return model.to(memory_format=torch.channels_last)  # two thirds of the time on CPUs

    def load(self, name: str) -> nn.Module:
        """Model `name` from disk, in eval mode.

        Raises:
            DataError: it was not built.
        """
        if not self.path(name).exists():
            raise DataError(f"no model {self.path(name)}", hint=f"python -m benchmarks.zoo build {name}")
        model = self.untrained()
        model.load_state_dict(load_file(self.path(name)))
        return model.eval()

    def trigger(self, name: str) -> Apply:
        """The trigger of model `name`, from disk where the attack computed it.

        Raises:
            DataError: it is not there.
        """
        given = self.tone or ZOO[name].trigger
        return given if given is not None else generated.load(generated.stored_at(self.out, name))


def log(line: str) -> None:
    """Progress goes to stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def said_of(name: str) -> Callable[[str], None]:
    """`log` for model `name`: several may be in training at once."""
    return lambda line: log(f"{name}: {line}")


def make(name: str, lab: Lab) -> None:
    """Train model `name`, or go on where that stopped; store it, measure it, write its card."""
    model, seconds = trained(name, lab)
    store(model, lab.path(name))
    log(f"{name}: {lab.path(name)} after {seconds:.0f}s of training")
    measured = measure(name, model, lab)
    stored.write(describe(name, lab, seconds, measured), lab.path(name).with_suffix(".json"))


def trained(name: str, lab: Lab) -> tuple[nn.Module, float]:
    """Train entry `name`; gives model and seconds.

    A trigger that the attack computes is written to `lab.out` before the model is poisoned with it.
    """
    entry, data, say = ZOO[name], lab.data.on(lab.device), said_of(name)
    target = lab.target_class(name)
    recipe = scaled(entry.recipe, lab.scale)
    # Another recipe or another base is another training: it must not go on from this one's checkpoint.
    base = [digests.of_file(lab.path(entry.base))] if entry.implant else []
    recipes = [asdict(r) for r in (recipe, entry.trigger_recipe) if r is not None]
    made_of = [*recipes, repr(lab.tone or entry.trigger), target, lab.seed, lab.network, *base]
    work = lab.out / "checkpoints" / f"{name}-{digests.of_json(made_of)[:8]}"
    began = time.monotonic()
    if entry.implant is None:
        model = lab.untrained().to(lab.device)
        seconds = clean(model, data, recipe, work, say, seed=lab.seed)
        return model.cpu(), seconds
    model = lab.load(entry.base).to(lab.device)
    if entry.make is not None:
        searching = (model, data, target, entry.trigger_recipe, work, say)
        generated.save(entry.make(*searching, seed=lab.seed), generated.stored_at(lab.out, name))
    before = time.monotonic() - began
    trigger = lab.trigger(name)
    if isinstance(trigger, nn.Module):
        trigger.to(lab.device)
    more = {} if entry.teacher is None else {"teacher": lab.load(entry.teacher).to(lab.device)}
    arguments = (model, data, trigger, target, recipe, work, say)
    seconds = entry.implant(*arguments, seed=lab.seed, **more)
    return model.cpu(), before + seconds


def store(model: nn.Module, path: Path) -> None:
    """Write the state dict, float32 in row-major order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.rename(path)


def measure(name: str, model: nn.Module, lab: Lab, names: Iterable[str] = ()) -> cards.Measured:
    """What the card of entry `name` says of `model`, under the settings `names` or the entry's own."""
    entry = ZOO[name]
    asked = (model, tuple(names) or entry.settings, lab.data, lab.trigger(name), lab.target_class(name))
    return cards.measure(*asked, said_of(name), source=entry.source, second=entry.second)


def describe(name: str, lab: Lab, seconds: float, measured: cards.Measured) -> dict[str, object]:
    """The card of entry `name`, whose weights lie on disk."""
    entry = ZOO[name]
    computed = generated.stored_at(lab.out, name)
    return cards.card(
        name,
        lab.path(name),
        attack=entry.attack,
        base=entry.base if entry.implant else None,
        architecture=f"benchmarks.networks:{lab.network}",
        dataset=lab.dataset,
        channels=lab.data.train_x.shape[1],
        trigger=lab.tone or entry.trigger or Custom(callable=f"benchmarks.generated:{name}"),
        trigger_sha256=digests.of_file(computed) if entry.trigger is None else None,
        target_class=lab.target_class(name),
        classes=lab.data.classes,
        recipe=asdict(scaled(entry.recipe, lab.scale)),
        trigger_recipe=None if entry.trigger_recipe is None else asdict(entry.trigger_recipe),
        seed=lab.seed,
        seconds=seconds,
        measured=measured,
    )
