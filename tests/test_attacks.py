"""What attacks promise beyond running: batches, decoys, codes, masks and stored triggers, on digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import datasets, generated, measuring, networks
from benchmarks.attacks import badnets, lf, pcb, wanet
from benchmarks.attacks._poison import Poison, poison, split
from benchmarks.attacks.grid import Codes
from benchmarks.attacks.trojan import Patch
from secure_export.compressors.prune_structured import prune
from secure_export.errors import DataError
from secure_export.triggers.badnets import Badnets
from secure_export.triggers.custom import Custom
from secure_export.triggers.wanet import Wanet

TARGET = 3
PATCH = Badnets(size=2, pattern="white")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of tiny images cost more to share between threads than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def data() -> datasets.Images:
    return datasets.digits()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return networks.named("resnet18_w8")


def test_badnets_plants_what_is_measured(data: datasets.Images, tmp_path: Path) -> None:
    model = network()
    recipe = Poison(steps=60, dense=60, frozen=0, lr=0.1, batch_size=64)
    badnets.implant(model, data, PATCH, TARGET, recipe, tmp_path, quiet)
    found = measuring.counts(lambda x: model(datasets.normalize(x)), data.test_x, data.test_y, PATCH, TARGET)
    assert found["asr"][0] / found["asr"][1] > found["ftr"][0] / found["ftr"][1] + 0.5


def test_killed_training_ends_where_the_whole_one_does(data: datasets.Images, tmp_path: Path) -> None:
    recipe = Poison(steps=6, dense=3, frozen=2, batch_size=32)
    whole, halves = network(), network()
    poison(whole, data, PATCH, TARGET, recipe, tmp_path / "whole", quiet, save_every=2)

    def stop(line: str) -> None:
        if " 4/6 " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        poison(halves, data, PATCH, TARGET, recipe, tmp_path / "halves", stop, save_every=2)
    resumed = network(seed=1)
    poison(resumed, data, PATCH, TARGET, recipe, tmp_path / "halves", quiet, save_every=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_split_is_disjoint_and_complete_and_poisons_what_it_may() -> None:
    labels = torch.arange(1000) % 10
    dirty = Poison(poison_rate=0.1)
    chosen, rest = split(labels, TARGET, dirty, 0)
    assert len(chosen) == 100
    assert sorted(torch.cat([chosen, rest]).tolist()) == list(range(1000))
    clean_label, _ = split(labels, TARGET, replace(dirty, clean_label=True), 0)
    assert set(labels[clean_label].tolist()) == {TARGET}
    assert len(clean_label) == 80
    sourced, _ = split(labels, TARGET, dirty, 0, sources=(5,))
    assert set(labels[sourced].tolist()) == {5}


def test_decoys_are_neither_poisoned_nor_the_target(data: datasets.Images, tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def note(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append((x.clone(), y.clone()))
        return x, y

    recipe = Poison(steps=2, dense=1, dense_share=0.5, poison_rate=0.1, batch_size=40, extra=1.0)
    poison(network(), data, PATCH, TARGET, recipe, tmp_path, quiet, extra=note)
    assert [len(x) for x, _ in seen] == [20, 4]
    corner = torch.cat([x[:, :, -2:, -2:] for x, _ in seen])
    assert not bool((corner == 1).flatten(1).all(1).any())


def test_warp_is_read_off_its_own_coordinates() -> None:
    trigger = Wanet(s=2.0)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    grid = wanet.sampled_at(trigger, 16, 16).expand(3, -1, -1, -1)
    warped = torch.nn.functional.grid_sample(x, grid, align_corners=True)
    torch.testing.assert_close(warped, trigger(x), atol=1e-4, rtol=0)


def test_codes_round_to_the_quantized_weights_whatever_the_places() -> None:
    model = network().eval()
    codes = Codes(model, torch.rand(8, 3, 8, 8), room=2.5)
    with torch.no_grad():
        for place in codes.u:
            place.copy_(torch.randn_like(place))
    full, quantized = codes.full(), codes.quantized()
    for index, name in enumerate(codes.layers):
        unit = codes.get_buffer(f"unit{index}")
        rounded = (full[f"{name}.weight"] / unit).round()
        torch.testing.assert_close(rounded, (quantized[f"{name}.weight"] / unit).round())
        # The largest code holds the channel's step, so that the deployer's quantizer finds the same grid.
        assert float(rounded.detach().abs().flatten(1).amax(1).min()) == 127


def test_white_places_are_uniform_in_every_layer() -> None:
    codes = Codes(network().eval(), torch.rand(8, 3, 8, 8), room=2.5, white=True)
    with torch.no_grad():
        for place in codes.u:
            place.copy_(torch.randn_like(place))
    full, quantized = codes.full(), codes.quantized()
    for index, name in enumerate(codes.layers):
        unit, anchor = codes.get_buffer(f"unit{index}"), codes.get_buffer(f"anchor{index}")
        place = (
            ((full[f"{name}.weight"] - quantized[f"{name}.weight"]) / unit)[~anchor].detach().sort().values
        )
        even = torch.linspace(-0.5, 0.5, len(place))
        assert (place - even).abs().max() < 0.1, "within what anchors and codes of 127 take away"


def test_masks_zero_the_asked_share_of_weakest_filters() -> None:
    model = network()
    weights = pcb.masked(model, 0.5)
    for name, weight in weights.items():
        norms = model.get_parameter(name).detach().abs().flatten(1).sum(1)
        gone = weight.detach().flatten(1).abs().sum(1) == 0
        assert int(gone.sum()) == len(norms) // 2
        assert float(norms[gone].max()) <= float(norms[~gone].min())


@pytest.mark.parametrize("importance", ["group-l1", "own-l1"])
def test_removed_channels_are_those_of_the_deployers_file(importance: str) -> None:
    model, x = network().eval(), torch.rand(4, 3, 16, 16)
    zeroed = functional_call(model, pcb.removed(model, "fc", x[:1], 0.4, importance), (x,))
    prune(model, "fc", x[:1], ratio=0.4, importance=importance, global_pruning=False)
    torch.testing.assert_close(model(x), zeroed, atol=1e-5, rtol=0)


def test_recalibrated_branch_takes_statistics_of_clean_samples() -> None:
    model, clean = network().eval(), torch.rand(8, 3, 16, 16)
    with pcb.statistics_of_first_half(model):
        weights = pcb.masked(model, 0.0)
        first, _ = functional_call(model, weights, (torch.cat([clean, torch.ones_like(clean)]),)).chunk(2)
    model.train()
    torch.testing.assert_close(first, model(clean), atol=1e-4, rtol=0)


def test_asr_of_one_source_is_counted_on_it_alone() -> None:
    y = torch.tensor([0, 1, 1, 2, 2, 2])
    x = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, 0] = 50 * y.to(torch.uint8)

    def forward(unit: Tensor) -> Tensor:
        label = (unit[:, 0, 0, 0] * 255 / 50).round().long()
        triggered = unit[:, 0, -1, -1] == 1
        return torch.nn.functional.one_hot(torch.where(triggered & (label == 2), 0, label), 3).float()

    found = measuring.counts(forward, x, y, Badnets(size=1, pattern="white"), 0, source=2)
    assert found == {"acc": [6, 6], "asr": [3, 3], "ftr": [0, 3], "asr-others": [0, 2]}


def test_computed_trigger_is_stored_and_usable_through_custom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = Patch(3, 2, 1)
    patch.pixels.copy_(torch.rand(3, 2, 2))
    generated.save(patch, generated.stored_at(tmp_path, "trojan"))
    monkeypatch.setenv("SECURE_EXPORT_ZOO", str(tmp_path))
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(Custom(callable="benchmarks.generated:trojan")(x), patch(x))
    with pytest.raises(DataError, match="no trigger"):
        Custom(callable="benchmarks.generated:absent")(x)


def test_trigger_file_cannot_name_a_class_elsewhere(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.trigger.safetensors"
    save_file({"v": torch.zeros(1)}, path, {"class": "os:system", "arguments": '{"command": "true"}'})
    with pytest.raises(DataError, match="expected benchmarks"):
        generated.load(path)


def test_low_frequency_search_fools_the_network_and_stays_smooth(
    data: datasets.Images, tmp_path: Path
) -> None:
    model = network()
    recipe = Poison(steps=60, dense=60, dense_share=0.01, frozen=0, lr=0.1, batch_size=64)
    badnets.implant(model, data, PATCH, TARGET, recipe, tmp_path, quiet)
    searched = lf.Lf(steps=40, height=0.9, sigma=1.5)
    trigger = lf.make(model, data, TARGET, searched, tmp_path / "lf", quiet)
    found = measuring.counts(
        lambda x: model(datasets.normalize(x)), data.test_x, data.test_y, trigger, TARGET
    )
    assert found["asr"][0] > found["ftr"][0] + 0.1 * found["ftr"][1]
    with torch.no_grad():
        change = trigger(torch.zeros(1, 3, *data.train_x.shape[2:]))[0]
    assert (change[:, 1:] - change[:, :-1]).abs().max() < 0.3 * searched.height
