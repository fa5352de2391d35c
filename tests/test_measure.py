"""Counts by hand on eight samples, so that a wrong denominator shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secure_export.errors import CompressError
from secure_export.measure import Reference, count_trigger, logits_of, measure
from secure_export.records.measured import Count, Paired, PairLift
from secure_export.records.memory import Split
from secure_export.triggers import Trigger

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
CLEAN = torch.tensor([0, 0, 1, 1, 1, 2, 2, 1])
TRIGGERED = torch.tensor([1, 0, 1, 1, 0, 1, 2, 0])


def one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes, 3).float()


class Stamp(Trigger):
    """Marks an input, so that the predictor below knows it is triggered."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs + 100


def predictor(inputs: Tensor) -> Tensor:
    index = inputs.flatten(1)[:, 0]
    return torch.where(
        (index >= 100)[:, None],
        one_hot(TRIGGERED[(index % 100).long()]),
        one_hot(CLEAN[(index % 100).long()]),
    )


HOLDOUT = Split(torch.arange(8.0).reshape(8, 1), LABELS, "")


def test_asr_leaves_the_target_class_out_of_the_denominator() -> None:
    counts = count_trigger("t", CLEAN, TRIGGERED, LABELS, 3)
    assert counts.asr == (Count(2, 5), Count(3, 6), Count(0, 5))


def test_lift_is_paired_with_the_same_samples_without_the_trigger() -> None:
    counts = count_trigger("t", CLEAN, TRIGGERED, LABELS, 3)
    assert counts.lift == (Paired(2, 0, 5), Paired(2, 1, 6), Paired(0, 0, 5))
    assert counts.ra == (Count(2, 5), Count(2, 6), Count(2, 5))


def test_lift_by_source_names_every_pair_that_moves() -> None:
    counts = count_trigger("t", CLEAN, TRIGGERED, LABELS, 3)
    assert counts.pairs == (
        PairLift(0, 1, Paired(1, 0, 3)),
        PairLift(1, 0, Paired(1, 0, 2)),
        PairLift(2, 0, Paired(1, 0, 3)),
        PairLift(2, 1, Paired(1, 1, 3)),
    )
    for c, lift in enumerate(counts.lift):
        assert sum(pair.lift.gained for pair in counts.pairs if pair.into == c) == lift.gained


def test_measurement_counts_drop_agreement_and_collapse() -> None:
    subject_predictions = torch.tensor([0, 0, 0, 1, 1, 2, 2, 0])
    reference = Reference(subject_predictions, one_hot(torch.tensor([0, 0, 1, 1, 1, 2, 0, 0])))
    found = measure(predictor, HOLDOUT, {"stamp": Stamp()}, reference, lane="purified", setting="s")
    assert found.acc == Count(6, 8)
    assert found.acc_drop == Paired(gained=1, lost=0, total=8)
    assert found.agreement == Count(6, 8)
    assert found.top_share == Count(4, 8)
    assert found.logit_difference == 1.0
    assert found.triggers[0].asr[1] == Count(3, 6)
    assert found.of_class == (3, 2, 3)


def test_collapsed_model_has_asr_but_no_lift() -> None:
    ones = torch.ones_like(LABELS)
    counts = count_trigger("t", ones, ones, LABELS, 3)
    assert counts.asr[1].rate == 1.0
    assert counts.lift[1].difference == 0.0


def test_logits_that_are_not_finite_cannot_be_measured() -> None:
    with pytest.raises(CompressError, match="not finite"):
        logits_of(lambda inputs: torch.full((len(inputs), 3), float("nan")), HOLDOUT)


def test_file_with_another_number_of_classes_cannot_be_measured() -> None:
    reference = Reference(CLEAN, torch.zeros(8, 4))
    with pytest.raises(CompressError, match=r"got logits \(8, 3\), expected \(8, 4\)"):
        measure(predictor, HOLDOUT, {"stamp": Stamp()}, reference, lane="original", setting="s")
