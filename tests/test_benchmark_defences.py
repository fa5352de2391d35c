"""The benchmark of the purifiers resumes, and keeps trials of other weights, recipes and seeds apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import datasets, defences
from benchmarks.purified import Shelf
from secure_export import registry
from secure_export.purifiers import Purifier
from secure_export.purifiers.clp import Clp
from tests import digits

COUNTS = {"acc": [8, 10], "asr": [1, 9]}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The trials that were really made: (weights, kind, seed)."""
    found: list[tuple[str, str, int]] = []
    x, y = torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.arange(40) % 10

    def trial(
        card: Path, recipe: dict[str, Any], fit: Any, data: datasets.Images, seed: int, shelf: Shelf
    ) -> dict[str, Any]:
        assert len(fit) == 20
        assert len(data.test_x) == 12
        found.append((json.loads(card.read_text())["sha256"], recipe["kind"], seed))
        return {"settings": {"fp32": COUNTS}, "cpu_seconds": 1.0}

    monkeypatch.setattr(datasets, "cifar10", lambda _: datasets.Images(x, y, x, y, tuple("0123456789")))
    monkeypatch.setattr(defences, "trial", trial)
    return found


def run(folder: Path, *more: str) -> None:
    arguments = [str(folder / "m.json"), "--out", str(folder / "out"), "--fit", "20", "--test", "12", *more]
    result = CliRunner().invoke(defences.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_a_stored_trial_is_not_made_again(tmp_path: Path, done: list[tuple[str, str, int]]) -> None:
    card = tmp_path / "m.json"
    card.write_text(json.dumps({"name": "m", "sha256": "a" * 64}))
    run(tmp_path, "--only", "d3")
    run(tmp_path, "--only", "d3", "--only", "clp")
    assert [(kind, seed) for _, kind, seed in done] == [("d3", 0), ("clp", 0)]
    run(tmp_path, "--only", "d3", "--seed", "1")
    run(tmp_path, "--recipe", '{"kind": "d3", "lam": 10}')
    card.write_text(json.dumps({"name": "m", "sha256": "b" * 64}))
    run(tmp_path, "--only", "d3")
    assert done[2:] == [("a" * 64, "d3", 1), ("a" * 64, "d3", 0), ("b" * 64, "d3", 0)]


def test_what_was_purified_once_is_taken_from_disk_and_nothing_else_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fit = digits.trained(True), digits.fit_split()
    shelf, arguments = Shelf(tmp_path, digits.HEAD), (1, {"kind": "clp", "u": 0.5}, fit, 0)
    made = shelf.purified(model, *arguments)
    with monkeypatch.context() as without:
        without.setattr(Clp, "purify", lambda *_, **__: pytest.fail("purified again"))
        again = shelf.purified(model, *arguments)
        with pytest.raises(pytest.fail.Exception, match="purified again"):
            shelf.purified(model, 1, {"kind": "clp", "u": 2.0}, fit, 0)
        with pytest.raises(pytest.fail.Exception, match="purified again"):
            shelf.purified(made, *arguments)
    inputs, _ = digits.held_out()
    assert torch.equal(again(inputs), made(inputs))
    assert not torch.equal(model(inputs), made(inputs))


@pytest.mark.parametrize("kind", defences.RECIPES)
def test_every_recipe_can_be_built(kind: str) -> None:
    assert registry.build(Purifier, "purifiers", {"kind": kind, **defences.RECIPES[kind]}).kind == kind


def test_no_purifier_is_left_out() -> None:
    assert sorted(defences.RECIPES) == registry.names("purifiers")
