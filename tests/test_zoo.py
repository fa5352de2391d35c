"""The attack lab: every attack runs, resumes and stores what it made, on handwritten digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import datasets, entries, lab

FEW = 3


def quiet(_: str) -> None:
    """No progress."""


def short(recipe: Any) -> Any:
    """The recipe with a few steps in every stage."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = short(value)
        elif field.name in ("steps", "joint", "settle", "epochs", "rounds") or field.name.endswith("_steps"):
            changes[field.name] = min(value, 1 if field.name in ("rounds", "epochs") else FEW)
        elif field.name in ("images", "batch_size"):
            changes[field.name] = 40
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def data() -> datasets.Images:
    return datasets.digits()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry with a short recipe."""
    for name, entry in entries.ZOO.items():
        changes = {"recipe": short(entry.recipe)}
        if entry.trigger_recipe is not None:
            changes["trigger_recipe"] = short(entry.trigger_recipe)
        monkeypatch.setitem(entries.ZOO, name, dataclasses.replace(entry, **changes))


@pytest.fixture
def bench(data: datasets.Images, tmp_path: Path) -> lab.Lab:
    """A folder with an untrained network under every name that attacks start from."""
    made = lab.Lab(tmp_path, data, "resnet18_w8")
    for entry in entries.ZOO.values():
        lab.store(made.untrained(), made.path(entry.base))
    return made


@pytest.mark.parametrize("name", [name for name in entries.ZOO if name != "clean"])
@pytest.mark.usefixtures("quick")
def test_attack_changes_the_network_and_applies_a_stored_trigger(name: str, bench: lab.Lab) -> None:
    before = bench.untrained().state_dict()
    model, seconds = lab.trained(name, bench)
    after = model.state_dict()
    assert seconds > 0
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    x = datasets.to_unit(bench.data.test_x[:8])
    triggered = bench.trigger(name)(x)
    assert triggered.shape == x.shape
    assert float((triggered - x).abs().max()) > 0
    assert 0 <= float(triggered.min()) <= float(triggered.max()) <= 1
