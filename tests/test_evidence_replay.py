"""What the rules of a policy say of a stored repair."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import evidence_replay
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
    assert evidence_replay.said(named, POLICY) == outcome
