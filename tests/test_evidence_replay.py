"""What the rules of a policy say of a stored repair."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import evidence_replay
from secure_export.policy import load_policy


def stored(replay: list[list[int]], warm: list[list[int]]) -> dict[str, Any]:
    tried = {"replay patch": replay, "warm patch": warm}
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
        ([stored([[18, 0, 100]], [[100, 0, 1000]])], "undecided"),
        ([stored([], [[100, 0, 1000]])], "undecided"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]]), stored([[300, 0, 1000]], [])], "refused"),
        ([stored([[10, 0, 1000]], [[100, 0, 1000]]), {"unmeasured": "no runtime"}], "undecided"),
        ([], "undecided"),
    ],
)
def test_the_worst_setting_speaks_and_nothing_tried_is_no_pass(settings: list[Any], outcome: str) -> None:
    named = {f"setting-{number}": one for number, one in enumerate(settings)}
    assert evidence_replay.said(named, load_policy(evidence_replay.BLIND)) == outcome
