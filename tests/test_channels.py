"""Pruned networks as weights and a plan: loaded again from the file, and never on the word of a bad plan."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from secure_export import channels, digests, loading, pipeline
from secure_export.compressors.prune_structured import PruneStructured
from secure_export.compressors.torchao_int8_weight_only import TorchaoInt8WeightOnly
from secure_export.errors import CompressError, LoadError
from secure_export.formats.safetensors import Safetensors
from secure_export.policy import load_policy
from secure_export.records.memory import silent
from tests import compression, toys
from tests.compression import CLASSES, HEAD, SHAPE, context, images, network, running

ARCHITECTURE = "tests.compression:network"


def pruned(ratio: float = 0.5, importance: str = "group-l1", model: nn.Module | None = None) -> nn.Module:
    step = PruneStructured(ratio=ratio, importance=importance)
    return step.on_module(model or network(), context(network()))[0]


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("pruned") / "model.safetensors"
    Safetensors().write(pruned(), images(2), path)
    return path.read_bytes()


def planned(content: bytes, change) -> bytes:
    """The same weights with the plan after `change` has been made to its dict, or with the text it gives."""
    size = int.from_bytes(content[:8], "little")
    plan = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][channels.KEY])
    text = change(plan)
    return save(load(content), {channels.KEY: text if isinstance(text, str) else json.dumps(plan)})


def subject(content: bytes, folder, architecture: str = ARCHITECTURE):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    options = {"classes": None, "head": None, "mean": None, "std": None, "input_shape": SHAPE}
    return loading.load(path, architecture, **options)


@pytest.mark.parametrize("importance", ["group-l1", "own-l1"])
def test_pruned_network_is_measured_from_its_file(importance, tmp_path):
    model, path = pruned(importance=importance), tmp_path / "model.safetensors"
    Safetensors().write(model, images(2), path)
    assert torch.equal(running("safetensors").open(path)(images(9)), model(images(9)))
    loaded = subject(path.read_bytes(), tmp_path).model
    assert weights(loaded) == weights(model) < 0.3 * weights(network())
    assert loaded.blocks[0].conv1.in_channels == 4
    assert repr(loaded) == repr(model)
    view = running("safetensors").view(path, "x")
    assert torch.allclose(view.latents(images(5)) @ view.weight.T + view.bias, model(images(5)), atol=1e-5)


def test_file_is_really_smaller(content, tmp_path):
    Safetensors().write(network(), images(2), tmp_path / "whole.safetensors")
    plan = len(channels.stored(channels.read(content, "model.safetensors")))
    assert len(content) - plan < 0.4 * (tmp_path / "whole.safetensors").stat().st_size


def test_pruned_twice_is_one_plan_of_the_first_network(tmp_path):
    first = pruned(0.5)
    second, _ = PruneStructured(ratio=0.5).on_module(copy.deepcopy(first), context(network()))
    path = tmp_path / "model.safetensors"
    Safetensors().write(second, images(2), path)
    assert weights(second) < weights(first)
    assert torch.equal(running("safetensors").open(path)(images(9)), second(images(9)))


def test_normalization_stays_in_front(tmp_path):
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    wrapped = loading.Normalized(network(), *options.values(), SHAPE).eval()
    model, _ = PruneStructured().on_module(wrapped, context(wrapped, f"model.{HEAD}"))
    path = tmp_path / "model.safetensors"
    Safetensors().write(model, images(2), path)
    assert all(not key.startswith("model.") for key in load(path.read_bytes()))
    assert torch.allclose(
        running("safetensors", **options).open(path)(images(5)), model(images(5)), atol=1e-5
    )


def test_vision_transformer(tmp_path):
    pytest.importorskip("timm")
    model = small_vit()
    model, _ = PruneStructured().on_module(model, context(small_vit()))
    path = tmp_path / "model.safetensors"
    Safetensors().write(model, images(2), path)
    runtime = running("safetensors", architecture=f"{__name__}:small_vit")
    assert torch.allclose(runtime.open(path)(images(5)), model(images(5)), atol=1e-5)


def small_vit() -> nn.Module:
    import timm

    options = {"img_size": 12, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **options, num_classes=CLASSES).eval()


class Depthwise(nn.Module):
    """As in MobileNets: a convolution with a group per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.point, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, inputs):
        hidden = torch.relu(self.point(torch.relu(self.wide(torch.relu(self.stem(inputs))))))
        return self.head(hidden.mean((2, 3)))


def test_depthwise_convolutions(tmp_path):
    model, _ = PruneStructured().on_module(Depthwise().eval(), context(network()))
    path = tmp_path / "model.safetensors"
    Safetensors().write(model, images(2), path)
    runtime = running("safetensors", architecture=f"{__name__}:Depthwise")
    assert torch.allclose(runtime.open(path)(images(5)), model(images(5)), atol=1e-6)
    assert model.wide.groups == 4


def test_same_bytes_in_another_process(content, tmp_path):
    """safetensors keeps metadata in a hash map: several keys would change places."""
    code = (
        "from pathlib import Path; from tests import test_channels as t;"
        f"t.Safetensors().write(t.pruned(), t.images(2), Path({str(tmp_path / 'again.safetensors')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "again.safetensors").read_bytes() == content


def test_quantized_weights_are_refused(tmp_path):
    model, _ = TorchaoInt8WeightOnly().on_module(network(), context(network()))
    with pytest.raises(CompressError, match=r"cannot export to \.safetensors: head\.weight is a "):
        Safetensors().write(model, images(2), tmp_path / "model.safetensors")


def test_cut_that_no_plan_tells_is_refused(tmp_path):
    model = network()
    channels.remember(model, None)
    channels.remember(model, {})
    with pytest.raises(CompressError, match="no plan of kept channels"):
        Safetensors().write(model, images(2), tmp_path / "model.safetensors")


def test_architecture_is_the_users(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CompressError, match="the architecture is not known"):
        running("safetensors", architecture="").open(path)
    with pytest.raises(LoadError, match=r"names .*, which the architecture has not"):
        subject(content, tmp_path, f"{__name__}:Depthwise")


STEM = "stem.weight"
HOSTILE = {
    "unknown-name": lambda plan: plan["kept"].update({"../x\x1b[31m": [[0]]}),
    "unknown-layer": lambda plan: plan["kept"].update({"blocks.9.weight": [[0]]}),
    "method": lambda plan: plan["kept"].update({"forward": [[0]]}),
    "too-large": lambda plan: plan["kept"][STEM].__setitem__(0, [0, 1, 2, 8]),
    "far-too-large": lambda plan: plan["kept"][STEM].__setitem__(0, [0, 1, 2, 10**30]),
    "duplicate": lambda plan: plan["kept"][STEM].__setitem__(0, [0, 0, 1, 2]),
    "descending": lambda plan: plan["kept"][STEM].__setitem__(0, [3, 2, 1, 0]),
    "negative": lambda plan: plan["kept"][STEM].__setitem__(0, [-1, 0, 1, 2]),
    "empty": lambda plan: plan["kept"][STEM].__setitem__(0, []),
    "other-count": lambda plan: plan["kept"][STEM].__setitem__(0, [0, 1, 2]),
    "axes": lambda plan: plan["kept"][STEM].pop(),
    "fraction": lambda plan: plan["kept"][STEM].__setitem__(0, [0, 1.5, 2, 3]),
    "true": lambda plan: plan["kept"][STEM].__setitem__(0, [0, True, 2, 3]),
    "missing-layer": lambda plan: plan["kept"].pop("blocks.0.conv1.weight"),
    "nothing": lambda plan: plan["kept"].clear(),
    "version": lambda plan: plan.update(version=2),
    "extra": lambda plan: plan.update(architecture="os:system"),
    "list": lambda plan: "[]",
    "no-json": lambda plan: "{",
    "deep": lambda plan: "[" * 100_000,
    "huge": lambda plan: '{"version":1,"kept":{}}' + " " * channels.LARGEST,
    "many": lambda plan: plan["kept"][STEM].__setitem__(0, list(range(10**6))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plan_is_one_clear_line(name, content, tmp_path):
    with pytest.raises(LoadError, match=r"^model\.safetensors|cannot take inputs of shape") as caught:
        subject(planned(content, HOSTILE[name]), tmp_path)
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


def test_other_channels_of_the_same_number_are_another_network(content, tmp_path):
    """The plan is applied to fresh weights that the file then replaces: only the shapes decide."""
    changed = planned(content, lambda plan: plan["kept"][STEM].__setitem__(0, [0, 1, 2, 3]))
    assert digests.of_state(subject(changed, tmp_path).model.state_dict()) == digests.of_state(
        subject(content, tmp_path).model.state_dict()
    )


def test_layers_that_do_not_fit_each_other_are_refused(content, tmp_path):
    """A plan and weights that agree with one another, but not with what the next layer reads."""
    state = load(content)
    state[STEM] = state[STEM][:3].contiguous()
    size = int.from_bytes(content[:8], "little")
    plan = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][channels.KEY])
    plan["kept"][STEM][0] = plan["kept"][STEM][0][:3]
    with pytest.raises(LoadError, match="cannot take inputs of shape") as caught:
        subject(save(state, {channels.KEY: json.dumps(plan)}), tmp_path)
    assert "\n" not in caught.value.message


def test_compression_network_is_not_touched_by_planning():
    model = network()
    before = digests.of_state(model.state_dict())
    pruned(model=copy.deepcopy(model))
    assert digests.of_state(model.state_dict()) == before
    assert channels.plan_of(model) == {}
    assert isinstance(model, compression.Residual)


def test_released_and_taken_again_as_a_checkpoint(run_toy, tmp_path):
    steps = [{"kind": "prune-structured", "ratio": 0.5, "recalibrate": False}]
    half = {"name": "half", "steps": steps, "format": {"kind": "safetensors"}}
    report = run_toy(toys.clean(), settings=[half], release=["half"], costs=True)
    assert report.verdict.outcome == "released", report.verdict
    whole, smaller = report.costs
    assert smaller.why == ""
    assert smaller.batch_1_ms
    assert smaller.macs == whole.macs // 2
    assert smaller.parameters < 0.6 * whole.parameters
    assert smaller.size < whole.size
    (released,) = (tmp_path / "run" / "release").glob("*.safetensors")
    policy = load_policy(tmp_path / "policy.yaml", {"subject.model": str(released)})
    assert released.read_bytes()[8:9] == b"{"
    subject = pipeline.load(policy, silent)[0]
    assert subject.model.conv.out_channels == 4
    assert subject.sha256 == report.settings[0].purified.artifact.sha256
