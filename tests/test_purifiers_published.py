"""The published defences: their equations on numbers checked by hand, and what they do to a backdoor."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secure_export import registry
from secure_export.errors import LoadError
from secure_export.purifiers import Purifier, _neurons, _sphere, anp, clp, d3, ft_sam, i_bau, nad, sau, tac
from secure_export.purifiers.fine_pruning import FinePruning
from tests import digits

REMOVED, LEFT = "removed", "left"
SHORT = {"epochs": 8, "batch_size": 64}
FATE: dict[str, tuple[dict[str, Any], str]] = {
    "anp": ({"iterations": 12}, LEFT),
    "clp": ({}, LEFT),
    "d3": ({"lam": 10.0, "epochs": 25, "batch_size": 32}, REMOVED),
    "ft-sam": ({"epochs": 2, "batch_size": 64}, LEFT),
    "i-bau": ({"lr": 1e-4, "rounds": 2}, LEFT),
    "nad": ({"lr": 0.01, "teacher_epochs": 2, "epochs": 4}, LEFT),
    "random-head": ({"epochs": 12, "batch_size": 64}, REMOVED),
    "rnp": ({"unlearned_at": 0.8, "threshold": 0.2, "recover_epochs": 6}, REMOVED),
    "sau": ({"epochs": 1, "batch_size": 64}, LEFT),
    "tac": (SHORT, REMOVED),
}
"""What becomes of the digits' patch (ASR 100 before) under these parameters, kept short."""


@cache
def backdoored() -> digits.Digits:
    return digits.trained(poisoned=True)


@pytest.mark.parametrize("kind", FATE)
def test_what_becomes_of_a_patch(kind: str) -> None:
    parameters, fate = FATE[kind]
    purifier = registry.build(Purifier, "purifiers", {"kind": kind, **parameters})
    result = purifier.purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    asr = digits.asr(result.model)
    assert asr < 0.1 if fate == REMOVED else asr > 0.5


def test_fine_pruning_cuts_features_and_weakens_the_patch() -> None:
    result = FinePruning(epochs=8, batch_size=64).purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    dead = (result.model.get_submodule(digits.HEAD).weight == 0).all(0)
    assert 0 < int(dead.sum()) < 32
    assert digits.asr(result.model) < 0.5


def test_the_least_shift_is_the_solution_of_its_problem() -> None:
    """Feasible for every sample, and in the cone of the constraints that it touches (Karush-Kuhn-Tucker)."""
    rng = np.random.default_rng(0)
    weight, bias, latents = rng.normal(size=(5, 12)), rng.normal(size=5), rng.normal(size=(40, 12))
    shift = tac.least_shift(weight, bias, latents, 2)
    assert shift is not None
    logits = (latents + shift) @ weight.T + bias
    slack = (logits[:, [2]] - np.delete(logits, 2, axis=1)).min(0)
    assert slack.min() >= -1e-8
    rows = np.delete(weight[2] - weight, 2, axis=0)
    multipliers, *_ = np.linalg.lstsq(rows.T, shift, rcond=None)
    assert np.allclose(rows.T @ multipliers, shift)
    assert multipliers.min() >= -1e-8
    assert np.abs(multipliers * slack).max() < 1e-8


def test_no_shift_gives_a_class_whose_row_another_class_shares() -> None:
    weight, latents = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.zeros((3, 2))
    assert tac.least_shift(weight, np.array([0.0, 1.0, 0.0]), latents, 0) is None
    assert tac.least_shift(weight, np.array([2.0, 1.0, 0.0]), latents, 0) == pytest.approx([0, 0])


def test_smallness_is_in_scaled_median_deviations() -> None:
    assert tac.smallness([10.0, 11.0, 9.0, 10.0, 2.0], 4) == pytest.approx(8 / 1.4826)


def test_d3_ends_on_the_sphere_and_away_from_the_poisoned_head() -> None:
    before = backdoored().head.weight.detach()
    after = (
        d3.D3(epochs=2)
        .purify(copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0)
        .model.head.weight.detach()
    )
    assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    assert (after - before).norm() > 0.5 * before.norm()


def test_d3_loss_hinges_each_sample() -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    weight, poisoned = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    found = d3.distance_loss(logits, torch.tensor([0, 0]), weight, poisoned, lam=0.5, eps=0.1, p=2)
    assert found.item() == pytest.approx(0.5 * (0 + np.log(2) - 0.1) / 2 - 5)
    heavy = d3.distance_loss(logits, torch.tensor([0, 0]), weight, poisoned, lam=3, eps=0.1, p=2)
    assert heavy.item() == pytest.approx((3 * (np.log(2) - 0.1) / 2 - 5) / 4)


@pytest.mark.parametrize(("warm_up", "distance"), [("near", 0), ("middle", 5), ("far", 10)])
def test_d3_starts_where_it_is_told(warm_up: d3.WarmUp, distance: float) -> None:
    poisoned = torch.tensor([[3.0, 4.0]])
    first = d3.started(poisoned, warm_up, 0.1, 2.0, torch.Generator().manual_seed(0))
    assert (first - poisoned).norm().item() == pytest.approx(distance)


@pytest.mark.parametrize("warm_up", ["random", "noise"])
def test_d3_draws_on_the_sphere(warm_up: d3.WarmUp) -> None:
    first = d3.started(torch.tensor([[3.0, 4.0]]), warm_up, 1.0, 2.0, torch.Generator().manual_seed(0))
    assert first.norm().item() == pytest.approx(5)
    assert _sphere.projected(torch.zeros(2), torch.ones(2)).norm() == 0


def test_sam_climbs_to_the_radius_along_scaled_gradients() -> None:
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    weight.grad = torch.tensor([3.0, 8.0])
    ((_, before),) = ft_sam.climb([weight], 0.5, adaptive=True)
    assert before.tolist() == [2, -1]
    assert weight.tolist() == pytest.approx([2 + 0.5 * 4 * 3 / 10, -1 + 0.5 * 8 / 10])


def test_smoothing_spreads_over_the_other_classes() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    log = torch.log_softmax(logits, 1)[0]
    found = ft_sam.smoothed_cross_entropy(logits, torch.tensor([0]), 0.1)
    assert found.item() == pytest.approx(-(0.9 * log[0] + 0.05 * log[1] + 0.05 * log[2]).item())


def test_attention_is_taken_at_the_end_of_each_resolution() -> None:
    inputs = digits.fit_split().inputs[:2]
    assert nad.stages(copy.deepcopy(backdoored()), inputs, digits.HEAD) == ("body.2", "body.6")
    maps = nad.attention_map(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]))
    assert maps.tolist()[0] == pytest.approx([9 / 97**0.5, 4 / 97**0.5], rel=1e-4)


def test_attention_needs_feature_maps() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(LoadError, match="feature map"):
        nad.stages(model, torch.rand(2, 4), "2")
    with pytest.raises(LoadError, match="nowhere"), nad.attention(model, ["nowhere"]):
        pass


def test_channel_bound_is_the_spectral_norm_after_batch_norm() -> None:
    layer, norm = nn.Conv2d(2, 2, (1, 2)), nn.BatchNorm2d(2, eps=0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]], [[[0.0, 2.0]], [[0.0, 0.0]]]]))
        norm.weight.copy_(torch.tensor([-2.0, 1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    assert clp.channel_bounds(layer, norm).tolist() == pytest.approx([3, 4])
    assert clp.channel_bounds(layer, None).tolist() == pytest.approx([3, 2])


def test_channels_far_above_their_layer_are_cut() -> None:
    model = copy.deepcopy(backdoored())
    with torch.no_grad():
        model.body[4].weight[7] *= 50
    result = clp.Clp().purify(model, digits.HEAD, digits.TARGET, digits.fit_split(), seed=0).model
    assert result.body[5].weight[7] == result.body[5].bias[7] == 0
    assert not clp.above(torch.tensor([4.0]), 0.0).any()


def test_neurons_are_batch_norms_or_else_layers_without_the_head() -> None:
    assert _neurons.scaled_layers(backdoored(), digits.HEAD) == ["body.1", "body.5"]
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    assert _neurons.scaled_layers(plain, "2") == ["0"]
    inputs = torch.rand(1, 1, 3, 3)
    halved = _neurons.scaled(plain, {"0": torch.tensor([0.5, 1.0])}, {"0": torch.tensor([0.5, 1.0])})(inputs)
    with torch.no_grad():
        plain[0].weight[0] *= 0.5
        plain[0].bias[0] *= 0.5
    assert torch.allclose(halved, plain(inputs))


def test_the_mask_stays_a_mask_and_the_running_statistics_stay_the_models() -> None:
    before = backdoored().state_dict()
    result = anp.Anp(iterations=4).purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    after = result.model.state_dict()
    assert torch.equal(after["body.1.running_mean"], before["body.1.running_mean"])
    changed = after["body.5.weight"] != before["body.5.weight"]
    assert (after["body.5.weight"][changed] == 0).all()


def test_hypergradient_of_a_quadratic() -> None:
    """Inner minimum d* = a; outer (d - 1)^2 + a^2 has dL/da = 2 (a - 1) + 2 a when the series converged."""
    a, delta = torch.tensor(0.3, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    _, (gradient,) = i_bau.hypergradient(
        lambda d: (d - a).square(), lambda d: (d - 1).square() + a.square(), delta, [a], 200, 0.1
    )
    assert gradient.item() == pytest.approx(2 * (0.3 - 1) + 2 * 0.3, rel=1e-4)


def test_shared_perturbations_keep_their_bound_and_the_input_range() -> None:
    inputs, labels = digits.fit_split().floats(slice(0, 32)), digits.fit_split().labels[:32]
    model = copy.deepcopy(backdoored())
    moved = sau.Sau(eps=0.1, step_size=0.05).shared(model, backdoored(), inputs, labels)
    assert (moved - inputs).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_shared_risk_looks_at_fooled_samples_only() -> None:
    logits = torch.tensor([[0.0, 1.0], [5.0, -5.0]], requires_grad=True)
    labels, wrong = torch.tensor([0, 0]), torch.tensor([1, 0])
    p = torch.softmax(logits[0], 0)[1].item()
    assert sau.shared_risk(logits, wrong, labels).item() == pytest.approx(-np.log(1 - p) / 2, rel=1e-3)
    assert sau.shared_risk(logits, labels, labels).item() == 0


def test_divergence_is_zero_for_equal_answers_and_log_2_for_opposite_ones() -> None:
    one, other = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    assert sau.jensen_shannon(one, one).item() == pytest.approx(0, abs=1e-6)
    assert sau.jensen_shannon(one, other).item() == pytest.approx(np.log(2), rel=1e-4)
