"""Tables of stored trials: what differs from a purifier's defaults, and where a trigger is awake."""

from __future__ import annotations

from typing import Any

from benchmarks import defences_table
from secure_export import registry
from secure_export.purifiers import Purifier


def trial(model: str, asr: int, fit: int = 500, **fields: Any) -> dict[str, Any]:
    purifier = registry.build(Purifier, "purifiers", {"kind": "lmr", **fields})
    rows = {"fp32": {"acc": [80, 100], "asr": [asr, 90]}, "int8-u8s8": {"acc": [79, 100], "asr": [1, 90]}}
    sleeps = {"fp32": {"asr": [1, 90]}, "int8-u8s8": {"asr": [80, 90]}}
    awake = {"fp32": {"asr": [80, 90]}, "int8-u8s8": {"asr": [80, 90]}}
    return {
        "model": model,
        "recipe": {"kind": "lmr", **purifier.model_dump(mode="json")},
        "seed": 0,
        "fit": fit,
        "settings": rows,
        "before": sleeps if model == "qcb" else awake,
    }


def test_a_line_says_what_differs_and_a_cell_is_of_the_file_where_the_trigger_wakes() -> None:
    trials = [
        trial("badnets", 45),
        trial("qcb", 45),
        trial("badnets", 9, alpha=4.0, optimizer="adam"),
        trial("qcb", 45, fit=10),
        trial("wanet", 9),
    ]
    head, _, *lines = defences_table.varied(trials)
    assert "`badnets`" in head
    assert "`wanet`" not in head  # of which nothing was varied
    assert lines == [
        "| nothing | 10 | 0 |  | 79.0 / 1.1 |",
        "| nothing | 500 | 0 | 80.0 / 50.0 | 79.0 / 1.1 |",
        "| alpha 4, optimizer adam | 500 | 0 | 80.0 / 10.0 |  |",
    ]


def test_a_field_that_a_stored_trial_does_not_know_is_no_difference() -> None:
    recipe = trial("badnets", 45)["recipe"]
    del recipe["optimizer"]
    assert defences_table.difference(recipe) == ""


def test_every_model_weighs_the_same_in_the_mean_and_what_is_no_traditional_attack_nothing() -> None:
    trials = [trial("badnets", 45), trial("wanet", 9), trial("qcb", 90)]
    for one in trials:
        one |= {"cpu_seconds": 10.0}
        for counts in one["before"].values():
            counts["acc"] = [90, 100]
        one["settings"]["fp32"]["ftr"] = [9, 90]
    mean = defences_table.table(trials)[-1]
    assert mean == "| mean of 2 traditional | 90.00 | 80.00 / 79.00 | 88.89 | 30.00 | 1.11 | 10.00 |  | 10 |"
    assert "mean of" not in defences_table.table(trials[:1])[-1]
