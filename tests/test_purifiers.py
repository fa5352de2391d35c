"""Every purifier keeps its contract; LMR's losses and cut are the paper's."""

from __future__ import annotations

import copy
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from secure_export import registry
from secure_export.augmentation import augmented
from secure_export.errors import DataError, LoadError
from secure_export.purifiers import Purifier, _inversion, _training, _views
from secure_export.purifiers.fine_tune import FineTune
from secure_export.purifiers.lmr import Lmr, delta_columns
from secure_export.purifiers.lmr_plus import LmrPlus
from secure_export.records.memory import Purified, Split
from tests import digits

KINDS = registry.names("purifiers")
SHORT = {"epochs": 8, "batch_size": 64}
QUICK = {
    "lmr-plus": {"rounds": 2, "steps": 8, "search_steps": 8},
    "anp": {"iterations": 12},
    "d3": {"lam": 10.0, "epochs": 16, "batch_size": 32},
    "fine-pruning": SHORT,
    "ft-sam": SHORT,
    "i-bau": {"lr": 1e-4, "rounds": 2},
    "nad": {"lr": 0.01, "teacher_epochs": 2, "epochs": 4},
    "random-head": SHORT | {"epochs": 12},
    "rnp": {"unlearned_at": 0.8, "threshold": 0.2, "recover_epochs": 6},
    "sau": {"epochs": 1, "batch_size": 64},
    "tac": SHORT,
}
"""What keeps a contract test short, and a network of 6,000 weights whole, where the defaults do not."""
COST = {"rnp": 0.08}
"""Accuracy that a kind costs on the toy beyond what others may."""


@cache
def backdoored(head: str = "linear") -> digits.Digits:
    return digits.trained(poisoned=True, head=head)


def build(kind: str) -> Purifier:
    return registry.build(Purifier, "purifiers", {"kind": kind, **QUICK.get(kind, {})})


@cache
def purified(kind: str, head: str = "linear") -> Purified:
    purifier = build(kind)
    model = copy.deepcopy(backdoored(head))
    return purifier.purify(model, digits.HEAD, digits.TARGET, digits.fit_split(), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_the_clean_task_and_returns_a_model_ready_to_export(kind: str) -> None:
    result = purified(kind)
    assert not result.model.training
    assert digits.acc(result.model) >= digits.acc(backdoored()) - COST.get(kind, 0.03)
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_history_has_a_row_an_epoch_with_what_the_figures_need(kind: str) -> None:
    history = purified(kind).history
    assert history
    for row in history:
        assert {"phase", "loss", "fit_acc", "target_acc", "margin", "active"} <= set(row)
        assert all(isinstance(value, str) or value == value for value in row.values()), "NaN is no JSON"


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_model_and_the_global_stream_is_left_alone(kind: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    purifier = build(kind)
    fit, model = digits.fit_split(), copy.deepcopy(backdoored())
    before = fit.inputs.clone()
    again = purifier.purify(model, digits.HEAD, digits.TARGET, fit, seed=0).model
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(fit.inputs, before)
    first = purified(kind).model.state_dict()
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_1x1_convolution_can_be_the_head(kind: str) -> None:
    assert digits.acc(purified(kind, "conv").model) > 0.94 - COST.get(kind, 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_fit_split_without_the_class(kind: str) -> None:
    fit = digits.fit_split()
    others = fit.labels != digits.TARGET
    purifier = build(kind)
    with pytest.raises(DataError, match="0 of"):
        purifier.purify(
            copy.deepcopy(backdoored()),
            digits.HEAD,
            digits.TARGET,
            Split(fit.inputs[others], fit.labels[others], ""),
            seed=0,
        )


@pytest.mark.parametrize("head", ["nowhere", "body.0"])
@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_head_that_is_none(kind: str, head: str) -> None:
    purifier = build(kind)
    with pytest.raises(LoadError, match=head):
        purifier.purify(copy.deepcopy(backdoored()), head, digits.TARGET, digits.fit_split(), seed=0)


def test_phase_one_loss_is_equations_5_to_8() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.8], [3.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    target = 2
    ce = -torch.log_softmax(logits, 1)
    sce = ce[0, 0] + ce[1, 1]
    dsc = (0 - 2 + 3) + (0.8 - 1 + 3)
    cm = 0 + (0.8 - 1 + 0.5)
    found = Lmr(m1=3, alpha=2, m2=0.5, beta=0.25).phase1_loss(logits, labels, target)
    assert found.item() == pytest.approx(((sce + 2 * dsc + 0.25 * cm) / 3).item())
    with_target = Lmr(m1=3, alpha=2, m2=0.5, beta=0.25, cm_on_target=True).phase1_loss(logits, labels, target)
    assert with_target.item() == pytest.approx(((sce + 2 * dsc + 0.25 * (cm + 3.5)) / 3).item())


def test_the_cut_takes_the_columns_whose_target_row_moved_most() -> None:
    before = torch.zeros(3, 10)
    after = before.clone()
    after[1, 4], after[1, 7], after[0, 2] = -5.0, 3.0, 100.0
    assert delta_columns(before, after, 1, 0.29).tolist() == [4, 7]


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.01), ("adam", 0.001)])
def test_cut_columns_stay_zero_through_phase_two(optimizer: Literal["sgd", "adam"], lr: float) -> None:
    lmr = Lmr(
        prune_ratio=0.25, phase1_epochs=2, phase2_epochs=3, early_switch=False, optimizer=optimizer, lr=lr
    )
    result = lmr.purify(copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0)
    weight = result.model.get_submodule(digits.HEAD).weight
    assert int((weight == 0).all(0).sum()) == 8
    assert [row["phase"] for row in result.history] == ["phase1"] * 2 + ["phase2"] * 3


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.01), ("adam", 0.003)])
def test_phase_one_widens_the_margin_and_drops_the_class(
    optimizer: Literal["sgd", "adam"], lr: float
) -> None:
    fit = digits.fit_split()
    before = _training.epoch_record(backdoored(), fit, digits.TARGET, "", [], 0.0)
    lmr = Lmr(m1=15, phase1_epochs=6, phase2_epochs=0, early_switch=False, optimizer=optimizer, lr=lr)
    after = lmr.purify(copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, fit, seed=0)
    assert float(after.history[-1]["margin"]) < float(before["margin"]) - 3
    assert float(after.history[-1]["target_acc"]) < 0.9


def test_early_switch_ends_phase_one() -> None:
    result = Lmr(switch_at=10.0, phase1_epochs=5, phase2_epochs=1).purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    assert [row["phase"] for row in result.history] == ["phase1", "phase2"]


def test_fine_tuning_alone_leaves_this_backdoor() -> None:
    """The control: what removes it elsewhere is not the mere training on clean samples."""
    result = FineTune(epochs=10).purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    assert digits.asr(result.model) > 0.9


def test_augmentation_shifts_and_mirrors_images_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(64, 1, 32, 32)
    images[:, :, 16, 10] = 1
    moved = augmented(images, "auto", True, generator)
    assert moved.shape == images.shape
    places = {tuple(place) for place in moved.nonzero()[:, 2:].tolist()}
    columns = {column for _, column in places}
    assert {row for row, _ in places} <= set(range(12, 21))
    assert columns & set(range(6, 15))
    assert columns & set(range(17, 26))
    assert columns <= set(range(6, 15)) | set(range(17, 26))
    still = augmented(images, "auto", False, generator).nonzero()[:, 3]
    assert set(still.tolist()) <= set(range(6, 15))
    for untouched in (torch.rand(4, 1, 8, 8), torch.rand(4, 3, 100)):
        assert torch.equal(augmented(untouched, "auto", True, generator), untouched)


def test_one_last_sample_does_not_make_a_batch() -> None:
    split = Split(torch.rand(65, 3), torch.arange(65) % 2, "")
    sizes = [len(labels) for _, labels in _training.batches(split, 64, torch.Generator())]
    assert sizes == [64]


def test_head_may_sit_anywhere() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 2)))
    assert _training.find_head(model, "1.0") is model[1][0]


def test_lmr_plus_removes_what_fine_tuning_leaves() -> None:
    purifier = LmrPlus(rounds=6, lr=1e-3)
    result = purifier.purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    assert digits.asr(result.model) < 0.1
    assert digits.acc(result.model) > digits.acc(backdoored()) - 0.03


def test_lmr_plus_searches_on_in_the_family_that_finds_the_backdoor() -> None:
    """A patch is found by patches, so no round goes to perturbations of the whole image."""
    purifier = LmrPlus(rounds=2, steps=2, families=("l2", "patch"), l2_rms=(0.001, 0.002))
    result = purifier.purify(
        copy.deepcopy(backdoored()), digits.HEAD, digits.TARGET, digits.fit_split(), seed=0
    )
    assert [row["phase"] for row in result.history] == ["repel-patch", "repel-patch", "average"]
    assert result.history[0]["searched"] > 0.9


def test_lmr_plus_needs_a_view_to_search() -> None:
    with pytest.raises(ValueError, match="odds of no view"):
        LmrPlus(views=(0.0, 0.0, 0.0))


class Sequence1d(nn.Module):
    """[N, C, T] without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 5)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(inputs).relu().mean(2))
        return logits


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_need_not_be_images(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    fit = Split(torch.rand(60, 2, 40, generator=generator), torch.arange(60) % 3, "")
    model = Sequence1d().eval()
    result = build(kind).purify(model, "head", 1, fit, seed=0)
    assert result.model(fit.inputs).isfinite().all()


@pytest.mark.parametrize("family", ["patch", "l2", "linf"])
def test_searched_perturbations_keep_their_budget(family: str) -> None:
    inputs = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(1))
    budget = torch.tensor([4.0, 9.0]) if family == "patch" else torch.tensor([0.1, 0.5])

    def logits(batch: Tensor) -> Tensor:
        return batch.flatten(1) @ weight.T

    found = _inversion.universal(
        [logits], inputs, 2, family, budget, steps=40, batch=32, generator=torch.Generator().manual_seed(2)
    )
    if family == "patch":
        assert ((1 - found.keep).flatten(1).sum(1) <= budget + 1e-3).all()
    elif family == "l2":
        assert found.add.flatten(1).norm(dim=1) == pytest.approx(budget)
    else:
        assert (found.add.flatten(1).abs().amax(1) <= budget + 1e-6).all()
    stamped = found.stamp(inputs, torch.arange(32) % 2)
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    before = (logits(inputs).argmax(1) == 2).float().mean()
    assert _inversion.success(logits, inputs, 2, found)[1] > before + 0.2
    again = _inversion.universal(
        [logits],
        inputs,
        2,
        family,
        budget,
        steps=0,
        batch=32,
        generator=torch.Generator().manual_seed(3),
        start=found,
    )
    assert again.add == pytest.approx(found.add, abs=0.15)


def test_perturbed_samples_stay_within_epsilon() -> None:
    inputs = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    moved = _inversion.per_sample(
        lambda x: x[:, :2] / 10, inputs, 0, 0.1, 3, torch.Generator().manual_seed(0)
    )
    assert (moved - inputs).abs().max() <= 0.1 + 1e-6
    assert ((moved - inputs)[:, 0] >= 0).all()
    assert ((moved - inputs)[:, 1] <= 0).all()


def test_int8_view_rounds_each_output_channel_and_passes_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.27, 0.504, -0.116], [127.0, 50.4, 11.6]]))
    rounded = _views.int8_weights(model)["0.weight"]
    expected = torch.tensor([[1.27, 0.50, -0.12], [127.0, 50.0, 12.0]])
    assert torch.allclose(rounded, expected, atol=1e-5)
    rounded.sum().backward()
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))


def test_rounding_noise_redraws_the_side_of_a_threshold() -> None:
    model = nn.Sequential(nn.Linear(4000, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.51)
        model[0].weight[0, 0] = 127
    before = model[0].weight.clone()
    _views.add_rounding_noise(model, 0.5, torch.Generator().manual_seed(0))
    assert (model[0].weight - before).abs().max() <= 0.5
    codes = (model[0].weight / _views.steps_of(model[0].weight)).round()[0, 1:]
    assert 0.4 < float((codes == 0).float().mean()) < 0.6


def test_masked_view_cuts_the_weakest_channels_and_leaves_the_model_alone() -> None:
    model = copy.deepcopy(backdoored()).eval()
    inputs = digits.fit_split().floats()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = _views.followers(model, inputs[:2])
    assert norms == {"body.0": "body.1", "body.4": "body.5"}
    weights = _views.masked_weights(model, 0.5, norms, digits.HEAD)
    strength = model.body[0].weight.flatten(1).abs().sum(1)
    alive = weights["body.0.weight"].flatten(1).abs().sum(1) > 0
    assert int(alive.sum()) == 8
    assert strength[alive].min() >= strength[~alive].max()
    assert (weights["body.1.bias"][~alive] == 0).all()
    buffers = _views.calibrated_buffers(model, weights, inputs)
    _views.View(model, weights, buffers)(inputs)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrated_statistics_are_those_of_the_clean_batch_under_the_given_weights() -> None:
    model = copy.deepcopy(backdoored())
    inputs = digits.fit_split().floats()
    doubled = {"body.0.weight": 2 * model.body[0].weight.detach()}
    buffers = _views.calibrated_buffers(model, doubled, inputs)
    expected = 2 * model.body[0](inputs).mean((0, 2, 3))
    assert torch.allclose(buffers["body.1.running_mean"], expected, atol=1e-4)
    assert model.body[1].momentum == 0.1


def test_sparse_view_zeroes_the_smallest_weights_of_every_layer_but_the_head() -> None:
    sparse = _views.sparse_weights(backdoored(), 0.5, digits.HEAD)
    assert set(sparse) == {"body.0.weight", "body.4.weight"}
    for name, weight in sparse.items():
        full = backdoored().get_parameter(name)
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert full[weight != 0].abs().min() >= full[weight == 0].abs().max()


@pytest.mark.parametrize(("channels", "stride", "last"), [(16, 2, True), (5, 1, True), (5, 2, False)])
def test_channels_stay_first_where_the_gradient_would_overrun_memory(
    channels: int, stride: int, last: bool
) -> None:
    """With fewer channels than a vector, a strided 1x1 convolution's backward pass ended the process."""
    layer = nn.Conv2d(channels, 8, 1, stride=stride)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), layer)
    with _training.channels_last(model, Split(torch.zeros(2, 3, 8, 8), torch.zeros(2), "")):
        first = model.get_submodule("0").get_parameter("weight")
        assert first.is_contiguous(memory_format=torch.channels_last) is last
    assert model.get_submodule("0").get_parameter("weight").is_contiguous()
