"""Clean models are made once, and false alarms, misses and files that were not read are counted apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import clean_models, lab, locate_table, sources
from benchmarks.datasets import digits
from benchmarks.lab import Lab
from secure_export import statistics
from secure_export.records.measured import UNREAD


def test_fleet_is_made_once_and_a_backdoor_starts_from_its_own_clean_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(name: str, bench: Lab) -> None:
        made.append((bench.out.name, bench.seed, name))
        bench.out.mkdir(exist_ok=True)
        card = {
            "base": None if name == "clean" else "clean",
            "measured": {"fp32": {"acc": [9, 10], "asr": [5, 9]}},
        }
        bench.path(name).with_suffix(".json").write_text(json.dumps(card))

    monkeypatch.setattr(clean_models, "make", make)
    monkeypatch.setattr(sources, "named", lambda *_: digits())
    monkeypatch.setattr(clean_models, "FLEETS", (clean_models.Fleet("digits", "cnn", range(2), 1),))
    outputs = [CliRunner().invoke(clean_models.main, ["--out", str(tmp_path)]).stdout for _ in range(2)]
    assert made == [
        ("digits-cnn-0", 0, "clean"),
        ("digits-cnn-0", 0, "badnets"),
        ("digits-cnn-1", 1, "clean"),
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[1] == "digits-cnn-0/badnets: fp32 acc 90.0 asr 55.6"


def test_seed_and_network_give_the_weights(tmp_path: Path) -> None:
    def first(seed: int) -> Any:
        return next(lab.Lab(tmp_path, digits(), "cnn", seed=seed).untrained().parameters())

    assert first(3).equal(first(3))
    assert not first(3).equal(first(4))


def model(attack: str, **answers: Any) -> dict[str, Any]:
    evidence = {"unread": {UNREAD: "no head"}}
    row = {
        "acc": [9, 10],
        "asr": [95 if attack != "none" else 0, 100],
        "ftr": [0, 100],
        "locators": {
            locator: {
                "class": None if said in ("none", "unread") else said,
                "evidence": evidence.get(said, {"score": 0.5}),
            }
            for locator, said in answers.items()
        },
    }
    return {"attack": attack, "target_class": 1, "dataset": "digits", "rows": {"fp32": row}}


def test_false_alarms_are_counted_with_exact_bounds_and_listed() -> None:
    clean = {f"c{i}": model("none", quiet="none", loud=4 if i == 0 else "none") for i in range(20)}
    clean["c20"] = model("none", quiet="unread")
    answers = list(locate_table.rows(clean))
    table = "\n".join(locate_table.false_alarms(answers))
    bound = f"{100 * statistics.upper(1, 20, 0.05):.1f} %"
    assert f"| loud | all | 19/20 | {bound} | 19/20 | {bound} | 0 |" in table
    assert "| quiet | all | 20/20 | 13.9 % | 20/20 | 13.9 % | 1 |" in table, "unread is not silent"
    assert f"| loud | fp32 | 19/20 | {bound} |" in list(locate_table.by_setting(answers))
    assert list(locate_table.each_alarm(answers)) == ["- `loud` on c0 fp32 (ACC 90.0): class 4, score 0.50"]


def test_hits_tell_the_target_from_another_class() -> None:
    found = {"a": model("badnets", x=1), "b": model("badnets", x=2), "c": model("badnets", x="none")}
    *_, line = locate_table.hits(list(locate_table.rows(found)))
    assert line == "| digits | badnets | awake | x | 1 | 1 | 1 | 0 |"


def test_together_a_model_is_named_by_any_locator_and_a_second_target_counts() -> None:
    found = {
        "zoo/badnets": model("badnets", x=2, y=1),
        "zoo/wanet": model("wanet", x=2, y="none"),
        "zoo/two-targets": model("badnets", x=7),
        "zoo/clean": model("none", x=1),
    }
    assert list(locate_table.together(list(locate_table.rows(found))))[2:] == [
        "| badnets | 2 | 1 | yes |",
        "| wanet | 2 | none | **no** |",
        "| two-targets | 7 | – | yes |",
        "",
        f"Named by one of them: 2 of 3 (at least {100 * statistics.lower(2, 3, 0.05):.1f} %).",
    ]
