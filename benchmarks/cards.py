"""A model's card: how it was made and what was measured; and the check of card and weights from disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from benchmarks import networks, settings
from benchmarks.attacks._poison import Apply
from benchmarks.datasets import Images, statistics
from benchmarks.measuring import Count, counts
from secure_export import digests
from secure_export.environment import versions
from secure_export.triggers import Trigger

Measured = dict[str, dict[str, Count]]


def measure(
    model: nn.Module,
    names: Sequence[str],
    data: Images,
    trigger: Apply,
    target_class: int,
    log: Callable[[str], None],
    *,
    source: int | None = None,
    second: tuple[Apply, int] | None = None,
) -> Measured:
    """What `measuring.counts` counts on the whole test split, by setting."""
    found: Measured = {}
    for name in names:
        forward = settings.forward(model, name, data)
        asked = (forward, data.test_x, data.test_y, trigger, target_class)
        found[name] = counts(*asked, source=source, second=second)
        log(f"{name} " + " ".join(f"{key} {show(value)}" for key, value in found[name].items()))
    return found


def card(
    name: str,
    path: Path,
    *,
    attack: str,
    base: str | None,
    architecture: str,
    dataset: str,
    channels: int,
    trigger: Trigger,
    trigger_sha256: str | None,
    target_class: int,
    classes: Sequence[str],
    recipe: dict[str, Any],
    trigger_recipe: dict[str, Any] | None,
    seed: int,
    seconds: float,
    measured: Measured,
) -> dict[str, Any]:
    """Everything that somebody needs to use the model, or to make it again."""
    return {
        "name": name,
        "attack": attack,
        "base": base,
        "architecture": architecture,
        "dataset": dataset,
        "mean": list(statistics(channels)[0]),
        "std": list(statistics(channels)[1]),
        "classes": list(classes),
        "target_class": target_class,
        "trigger": {"kind": trigger.kind, **trigger.model_dump(mode="json", exclude_none=True)},
        "trigger_sha256": trigger_sha256,
        "recipe": recipe,
        "trigger_recipe": trigger_recipe,
        "seed": seed,
        "training_seconds": round(seconds, 1),
        "sha256": digests.of_file(path),
        "measured": measured,
        "versions": dict(versions()),
    }


def read(path: Path) -> dict[str, Any]:
    """A stored card."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def network(content: dict[str, Any], path: Path) -> nn.Module:
    """The model that a card describes, from its weights at `path`: images in [0, 1] in, eval mode."""
    name = content["architecture"].rpartition(":")[2]
    model = networks.named(name, len(content["classes"]))
    model.load_state_dict(load_file(path))
    return networks.Normalized(model, len(content["mean"])).eval()


def differences(content: dict[str, Any], path: Path, measured: Measured) -> list[str]:
    """What of the card the file on disk does not confirm."""
    found = []
    if digests.of_file(path) != content["sha256"]:
        found.append(f"{path.name} is not the file that the card describes")
    for setting, values in measured.items():
        for key, value in values.items():
            stored = content["measured"][setting][key]
            if stored != value:
                found.append(f"{setting} {key}: card {show(stored)}, now {show(value)}")
    return found


def show(count: Count) -> str:
    """`k/n (p %)`."""
    return f"{count[0]}/{count[1]} ({100 * count[0] / count[1]:.2f} %)"
