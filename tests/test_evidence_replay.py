"""What the rules of a policy say of a stored repair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import evidence_replay, evidence_replay_table
from secure_export import registry
from secure_export.records.memory import Split
from secure_export.triggers import Trigger
from tests import toys
from tests.judging import make_policy

POLICY = make_policy(
    evidence={
        "preset": None,
        "probes": [{"kind": "patch"}, {"kind": "l2"}],
        "warm": ["patch"],
        "rules": [
            {"metric": "inverted_lift", "at_most": 0.4},
            {"metric": "replay_lift", "at_most": 0.2, "probes": ["patch", "l2"]},
            {"metric": "warm_lift", "at_most": 0.4},
        ],
    }
)


def stored(replay: list[list[int]], warm: list[list[int]], l2: int | None = 10) -> dict[str, Any]:
    tried = {"replay patch": replay, "warm patch": warm}
    tried |= {"replay l2": [[l2, 0, 1000]]} if l2 is not None else {}
    return {
        "acc": [85, 100],
        "true_asr": [9, 90],
        "tried": {
            how: {"found": [{"class": 1, "lift": lift} for lift in lifts]} for how, lifts in tried.items()
        },
    }


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ([stored([[10, 0, 1000]], [[100, 0, 1000]])], "passed"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000], [500, 0, 1000]])], "refused"),
        ([stored([[300, 0, 1000]], [[100, 0, 1000]])], "refused"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]], l2=300)], "refused"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]], l2=None)], "undecided"),
        ([stored([[18, 0, 100]], [[100, 0, 1000]])], "undecided"),
        ([stored([], [[100, 0, 1000]])], "undecided"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]]), stored([[300, 0, 1000]], [])], "refused"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]]), {"unmeasured": "no runtime"}], "undecided"),
        ([], "undecided"),
    ],
)
def test_the_worst_setting_speaks_and_nothing_tried_is_no_pass(settings: list[Any], outcome: str) -> None:
    named = {f"setting-{number}": one for number, one in enumerate(settings)}
    assert evidence_replay_table.said(named, POLICY) == outcome


def above(excess: float | None) -> dict[str, Any]:
    one = stored([[10, 0, 1000]], [[100, 0, 1000]])
    one["tried"]["warm patch"] |= {"excess": excess, "excess_class": 1}
    return one


@pytest.mark.parametrize(("excess", "outcome"), [(0.1, "passed"), (0.2, "refused"), (None, "undecided")])
def test_excess_over_clean_references_is_judged_too(excess: float | None, outcome: str) -> None:
    rules = [{"metric": "inverted_lift", "at_most": 0.4}, {"metric": "warm_excess", "at_most": 0.15}]
    section = {"preset": None, "probes": [{"kind": "patch"}], "references": ["a.safetensors"], "rules": rules}
    assert evidence_replay_table.said({"fp32": above(excess)}, make_policy(evidence=section)) == outcome


@pytest.mark.parametrize("left", [0.1, 0.3])
def test_a_repair_goes_as_far_as_leaves_the_asr(left: float) -> None:
    """Toys: the trigger's weight fades on the way, so fewer samples cross over."""
    images, labels = toys.samples(400)
    holdout = Split(torch.from_numpy(images), torch.from_numpy(labels), "holdout")
    trigger = registry.build(Trigger, "triggers", toys.TRIGGER)
    bench: Any = SimpleNamespace(splits=SimpleNamespace(holdout=holdout), triggers={"true": trigger})
    bad, clean = toys.awake(), toys.clean()
    share = evidence_replay.share_that_leaves(left, bad, clean, toys.TARGET, bench)
    stamped = trigger(holdout.floats(holdout.labels != toys.TARGET))
    after = evidence_replay.between(bad, clean, share)(stamped).argmax(1) == toys.TARGET
    assert 0 < share < 1
    assert abs(float(after.float().mean()) - left) < 0.05


def test_the_table_shows_what_was_evident_and_what_is_left_of_it() -> None:
    policy = make_policy(
        evidence={
            "preset": ["fast", "contrast"],
            "rules": [
                {"metric": "inverted_contrast", "at_most": 0.5},
                {"metric": "inverted_lift", "at_most": 0.5, "probes": ["patch", "l2", "warp"]},
                {
                    "metric": "replay_lift",
                    "at_most": 0.4,
                    "evident": True,
                    "probes": ["contrast-patch", "contrast-l2"],
                },
            ],
        }
    )

    def found(named: int, contrast: int, lift: int) -> dict[str, Any]:
        original = {"lift": [900, 0, 1000], "contrast": [contrast, 0, 1000]}
        return {"class": named, "origin": "fp32", "lift": [lift, 0, 1000], "original": original}

    tried = {
        "replay contrast-patch": {"found": [found(1, 700, 100), found(9, 300, 600)]},
        "replay contrast-l2": {"found": [found(4, 600, 200)]},
    }
    one = {"acc": [85, 100], "true_asr": [9, 90], "tried": tried}
    stored = {"models": {"bad": [{"repair": {"share": 0.5}, "settings": {"fp32": one}}]}}
    line = evidence_replay_table.table(stored, policy, "some.yaml")[2]
    assert line.endswith("| `patch` 0.70 → 1, `l2` 0.60 → 4 | `patch` 0.10, `l2` 0.20 | – | passed |")
    tried["replay contrast-l2"]["found"][0]["lift"] = [600, 0, 1000]
    assert "refused" in evidence_replay_table.table(stored, policy, "some.yaml")[2]
    del tried["replay contrast-l2"]
    assert "undecided" in evidence_replay_table.table(stored, policy, "some.yaml")[2]


@pytest.mark.parametrize(
    ("original", "outcome"),
    [
        ({"lift": [300, 0, 1000]}, "nothing to try"),
        ({"lift": [900, 0, 1000]}, "refused"),
        ({"contrast": [900, 0, 1000]}, "nothing to try"),  # of which no rule speaks
        (None, "refused"),  # stored before the original's was
    ],
)
def test_what_broke_no_rule_on_the_original_is_not_read(
    original: dict[str, Any] | None, outcome: str
) -> None:
    rule = {"metric": "replay_lift", "at_most": 0.2, "evident": True}
    policy = make_policy(
        evidence={
            "preset": None,
            "probes": [{"kind": "patch"}],
            "rules": [{"metric": "inverted_lift", "at_most": 0.4}, rule],
        }
    )
    trigger = {"class": 1, "origin": "fp32", "lift": [400, 0, 1000]} | (
        {} if original is None else {"original": original}
    )
    one = {"tried": {"replay patch": {"found": [trigger]}}}
    assert evidence_replay_table.said({"fp32": one}, policy) == outcome


def test_a_repair_that_is_stored_is_no_other_one() -> None:
    row = {"repair": {"left": 0.2, "toward": "lmr-plus", "share": 0.4}, "warm": False}
    assert evidence_replay.made_already(row, {"left": 0.2, "toward": "lmr-plus"}, warm=False)
    assert not evidence_replay.made_already(row, {"left": 0.2, "toward": "lmr-plus"}, warm=True)
    assert not evidence_replay.made_already(row, {"left": 0.2}, warm=False)
    assert not evidence_replay.made_already(
        {"repair": {"kind": "lmr", "m1": 10}}, {"kind": "lmr"}, warm=False
    )
    assert evidence_replay.made_already({"repair": {"share": 1.0}}, {"share": 1.0}, warm=True)
