"""A reference made on the spot knows the task again, and the trigger no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor

from secure_export import twins
from secure_export.errors import CompressError
from secure_export.forgetting import Weights, forgotten, relearned, weighted
from secure_export.records.memory import Split
from tests import compression, digits
from tests.gating import array, small

EFFORT = {"noise": 0.85, "steps": 150}


@cache
def poisoned() -> digits.Digits:
    return digits.trained(True)


def forgetful(twin: Callable[[Tensor], Tensor], fit: Split, **effort: Any) -> Callable[[Tensor], Tensor]:
    weights = forgotten(twin, fit, **effort)
    return partial(weighted(twin)[1], weights=weights)


def test_the_task_comes_back_and_the_trigger_does_not() -> None:
    model = poisoned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = forgetful(model, digits.fit_split(), seed=0, **EFFORT)
    assert digits.asr(model) > 0.9
    assert digits.asr(reference) < 0.75
    assert digits.acc(reference) > 0.8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_makes_the_same_reference_without_the_global_stream() -> None:
    inputs, _ = digits.held_out()
    torch.manual_seed(3)
    first = forgetful(poisoned(), digits.fit_split(), noise=0.7, steps=3, seed=1)
    torch.manual_seed(4)
    again = forgetful(poisoned(), digits.fit_split(), noise=0.7, steps=3, seed=1)
    other = forgetful(poisoned(), digits.fit_split(), noise=0.7, steps=3, seed=2)
    assert torch.equal(first(inputs[:9]), again(inputs[:9]))
    assert not torch.equal(first(inputs[:9]), other(inputs[:9]))


@pytest.mark.parametrize("kind", ["", "ort-static-int8"])
def test_a_file_forgets_through_its_twin(kind: str, tmp_path: Path) -> None:
    path = compression.written(kind, tmp_path)
    twin, fit = twins.of_onnx(path), Split(compression.images(32), torch.zeros(32, dtype=torch.int64), "")
    weights, call = weighted(twin)
    assert {value.ndim for value in weights.values()} >= {1, 4}
    assert torch.equal(call(fit.inputs, weights), twin(fit.inputs))
    moved, taught = (forgetful(twin, fit, noise=0.7, steps=steps, seed=0)(fit.inputs) for steps in (1, 60))
    assert (taught - twin(fit.inputs)).abs().mean() < 0.7 * (moved - twin(fit.inputs)).abs().mean()


def test_what_has_no_weights_to_move_is_refused() -> None:
    def logits(inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, :10]

    with pytest.raises(CompressError, match="cannot be moved"):
        forgetful(logits, digits.fit_split(), seed=0, **EFFORT)
    with pytest.raises(CompressError, match="holds no weights"):
        forgetful(torch.nn.Flatten(), digits.fit_split(), seed=0, **EFFORT)


def test_a_pattern_that_no_convolution_holds_is_forgotten_too() -> None:
    """A trigger may be told by a product with a constant: a reference that kept it would tell nothing."""
    proto = small(
        [
            helper.make_node("Mul", ["input", "pattern"], ["seen"]),
            helper.make_node("Flatten", ["seen"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["scores"]),
            helper.make_node("Add", ["scores", "shift"], ["logits"]),
        ],
        ["n", 1, 4, 4],
        [
            array("pattern", np.eye(4)[None, None], np.float32),
            array("weight", np.arange(64).reshape(16, 4), np.float32),
            array("bias", np.arange(4), np.float32),
            array("shift", [0, 0, 0, 1], np.float32),
        ],
    )
    twin = twins.Twin(proto, "crafted")
    fit = Split(torch.rand(32, 1, 4, 4), torch.zeros(32, dtype=torch.int64), "")
    moved = forgotten(twin, fit, noise=0.85, steps=1, lr=0.0, seed=0)
    assert set(moved) == {"pattern", "weight", "bias"}
    still = {name for name, value in moved.items() if torch.equal(value, twin.constants[name])}
    assert still == {"bias"}


def test_a_reference_that_knows_too_little_learns_anew_and_longer() -> None:
    model, fit, asked = digits.trained(False), digits.fit_split(), []
    whole = {name: value.detach() for name, value in model.named_parameters()}

    def make(steps: int) -> Weights:
        asked.append(steps)
        return {name: value * (steps >= 40) for name, value in whole.items()}

    made = relearned(make, model, fit, steps=10, longest=100)
    assert all(torch.equal(made[name], value) for name, value in whole.items())
    assert asked == [10, 20, 40]
    asked.clear()
    relearned(make, model, fit, steps=10, longest=39)
    assert asked == [10, 20]
