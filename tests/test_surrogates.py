"""Slopes that are lent: values stay, what is flat gets one, what is steep keeps its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secure_export.surrogates import STAND_INS, STEEPNESS, Surrogates, with_surrogates
from secure_export.twins._operators import hard_step, straight_rounded

FLAT: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "clamp": (lambda x: x.clamp(0, 1), -3),
    "clamp_max": (lambda x: x.clamp_max(0), 3),
    "clamp_min": (lambda x: x.clamp_min(0), -3),
    "clip": (lambda x: torch.clip(x, 0, 1), 3),
    "elu": (F.elu, -200),
    "erf": (torch.erf, 50),
    "exp": (torch.exp, -200),
    "gelu": (F.gelu, -50),
    "hard_step": (hard_step, 0),
    "hardsigmoid": (F.hardsigmoid, -9),
    "hardswish": (F.hardswish, -9),
    "hardtanh": (F.hardtanh, 5),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.0), -1),
    "max_pool1d": (lambda x: F.max_pool1d(torch.stack([x, x + 1])[None, None, :, 0], 2), 1),
    "max_pool2d": (lambda x: F.max_pool2d(torch.stack([x, x + 1])[None, None], (2, 1)), 1),
    "mish": (F.mish, -200),
    "mul": (lambda x: x * x, 0),
    "pow": (lambda x: x**300, 0.1),
    "relu": (F.relu, -1),
    "relu6": (F.relu6, 8),
    "selu": (F.selu, -200),
    "sigmoid": (torch.sigmoid, 400),
    "silu": (F.silu, -200),
    "softmax": (lambda x: torch.stack([x, x + 400]).softmax(0)[0], 0),
    "softplus": (F.softplus, -200),
    "straight_rounded": (lambda x: straight_rounded(x, 0.1, -5, 5), 3),
    "tanh": (torch.tanh, 40),
}


def slope(function: Callable[[Tensor], Tensor], at: float) -> float:
    value = torch.tensor([float(at)], requires_grad=True)
    made = function(value)
    if not made.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(made.sum(), value)
    return float(gradient)


def test_every_stand_in_is_tried() -> None:
    assert FLAT.keys() == STAND_INS.keys()


@pytest.mark.parametrize("name", FLAT)
def test_what_is_flat_gets_a_slope_and_keeps_its_value(name: str) -> None:
    function, at = FLAT[name]
    honest = slope(function, at)
    if not name.startswith("max_pool"):  # one of the two pooled values is steep there
        assert abs(honest) < 1e-6
    lent = with_surrogates(function)
    assert torch.equal(
        function(torch.tensor([float(at)])), lent(torch.tensor([float(at)], requires_grad=True)).detach()
    )
    # x * x at 0 has the sum's slope at once; of two pooled values, the smaller now has its share of the mean.
    expected = {"mul": 2.0, "pow": 300.0, "max_pool1d": 1 + STEEPNESS / 2, "max_pool2d": 1 + STEEPNESS / 2}
    assert slope(lent, at) == pytest.approx(expected.get(name, STEEPNESS))


def test_what_is_steep_keeps_its_slope() -> None:
    assert slope(with_surrogates(F.relu), 2.0) == 1.0
    assert slope(with_surrogates(torch.exp), 1.0) == pytest.approx(math.e)
    assert slope(with_surrogates(lambda x: 3 * x), 1.0) == 3.0


def test_in_place_and_without_gradients_it_computes_as_ever() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))
    inputs = torch.randn(5, 3)
    expected = layers(inputs)
    assert torch.equal(with_surrogates(layers)(inputs.requires_grad_(True)), expected)
    with torch.no_grad():
        assert torch.equal(with_surrogates(layers)(inputs), expected)


def test_an_exported_program_has_them_too() -> None:
    class Gated(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x - 5)

    program: Any = torch.export.export(Gated().eval(), (torch.rand(1),)).module()
    assert slope(program, 0.5) == 0
    with Surrogates():
        assert slope(program, 0.5) == pytest.approx(STEEPNESS)
