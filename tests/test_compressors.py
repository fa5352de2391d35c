"""Every compressor: it changes something, says how much, breaks nothing, touches nothing but its model."""

from __future__ import annotations

import copy
import dataclasses
import io

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from secure_export import digests, registry
from secure_export.batchnorms import scale_of
from secure_export.compressors import Compressor, Context, FileStep, ModuleStep
from secure_export.compressors._layers import recalibrate_batchnorm
from secure_export.compressors.fake_quant import FakeQuant
from secure_export.compressors.ort_fp16 import OrtFp16
from secure_export.compressors.ort_int4_weight_only import OrtInt4WeightOnly
from secure_export.compressors.ort_static_int8 import OrtStaticInt8, Reader
from secure_export.compressors.ort_target_int8 import OrtTargetInt8
from secure_export.compressors.prune_channel_mask import PruneChannelMask
from secure_export.compressors.prune_structured import PruneStructured, widths
from secure_export.compressors.prune_unstructured import PruneUnstructured
from secure_export.compressors.recover import Recover
from secure_export.errors import CompressError, PolicyError
from secure_export.formats.onnx import Onnx
from secure_export.records.memory import Split
from secure_export.runtimes.onnxruntime import Onnxruntime
from tests import compression, toys
from tests.compression import CLASSES, HEAD, built, calibration, context, images, network, running

NAMES = registry.names("compressors")
PRUNERS = [name for name in NAMES if name.startswith("prune-")]


def default(name: str) -> Compressor:
    # A seed that is drawn anew each time would not give the same bytes again; ten thousand steps take hours.
    fields = registry.load("compressors", name).model_fields
    options = {key: value for key, value in {"seed": 1, "iterations": 5}.items() if key in fields}
    return built(Compressor, "compressors", name, **options)


def module_step(name: str) -> ModuleStep:
    step = default(name)
    if not isinstance(step, ModuleStep):
        pytest.skip("works on the file")
    return step


def file_step(name: str) -> FileStep:
    step = default(name)
    if not isinstance(step, FileStep):
        pytest.skip("works on the module")
    return step


# ---- Every compressor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_module_step_changes_its_copy_and_nothing_else(name):
    step, model = module_step(name), network()
    teacher, split = network(), calibration()
    teacher_before, inputs_before = digests.of_state(teacher.state_dict()), split.inputs.clone()
    random_before = torch.random.get_rng_state()
    if name == "recover":  # which has nothing to learn from its own teacher
        nn.init.zeros_(model.blocks[0].conv1.weight[:4])
    known = context(teacher)

    compressed, change = step.on_module(model, dataclasses.replace(known, calibration=split))

    assert change.kind == name
    assert 0 < change.changed <= change.total
    assert not any(layer.training for layer in compressed.modules())
    logits = compressed(images(5))
    assert logits.shape == (5, CLASSES)
    assert logits.isfinite().all()
    assert digests.of_state(teacher.state_dict()) == teacher_before
    assert torch.equal(split.inputs, inputs_before)
    assert torch.equal(torch.random.get_rng_state(), random_before)


@pytest.mark.parametrize("name", NAMES)
def test_module_step_gives_the_same_weights_again(name):
    step, found = module_step(name), []
    for _ in range(2):
        found.append(io.BytesIO())
        torch.save(step.on_module(network(), context(network(7)))[0].state_dict(), found[-1])
    assert found[0].getvalue() == found[1].getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_module_step_survives_a_copy(name):
    compressed, _ = module_step(name).on_module(network(), context(network(7)))
    assert torch.equal(copy.deepcopy(compressed)(images(3)), compressed(images(3)))


@pytest.mark.parametrize("name", NAMES)
def test_file_step_writes_the_same_bytes_anywhere(name, tmp_path, capfd):
    step = file_step(name)
    found = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        path, change = compression.quantized(step, folder)
        assert change.kind == name
        assert 0 < change.changed <= change.total
        found.append((digests.of_file(path), change))
        suffix = path.suffix
        assert sorted(file.name for file in folder.iterdir()) == [f"model.int8{suffix}", f"model{suffix}"]
        assert str(tmp_path).encode() not in path.read_bytes()
    assert found[0] == found[1]
    runtime = running(registry.load("formats", step.works_on).runtime, precise=True)
    logits, expected = runtime.open(path)(images(64)), network()(images(64))
    assert logits.shape == expected.shape
    coarse = 2 if name == "ort-int4-weight-only" else 1
    assert (logits - expected).abs().max() < coarse * 0.1 * expected.abs().max()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"no ONNX file at all", "half"])
def test_file_step_refuses_a_broken_file(name, content, tmp_path):
    source, target = tmp_path / "model.onnx", tmp_path / "out.onnx"
    if content == "half":
        content = compression.exported()[: len(compression.exported()) // 2]
    source.write_bytes(content)
    step = file_step(name)
    with pytest.raises(CompressError, match=r"cannot quantize model\.onnx"):
        step.on_file(source, target, context(network()))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


# ---- The grid sweep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("grid", ["127", "127.5", "asymmetric", "7-bit"])
def test_weights_stand_on_the_grid_that_is_named(grid, per_channel, fold):
    model, given = network(), network()
    _, change = FakeQuant(grid=grid, per_channel=per_channel, fold=fold).on_module(model, context(network()))
    assert change.changed == change.total == 8
    for norm, name in (("norm", "stem"), ("blocks.0.norm1", "blocks.0.conv1")):
        factor = scale_of(given.get_submodule(norm)) if fold else torch.ones(1)
        before, after = (
            (net.get_submodule(name).weight * factor.view(-1, 1, 1, 1)) for net in (given, model)
        )
        rows, exact = (w.flatten(1) if per_channel else w.reshape(1, -1) for w in (after, before))
        for row, whole in zip(rows, exact, strict=True):
            span = (
                whole.max().clamp(min=0) - whole.min().clamp(max=0)
                if grid == "asymmetric"
                else whole.abs().max()
            )
            step = span / {"127": 127, "127.5": 127.5, "asymmetric": 255, "7-bit": 64}[grid]
            assert torch.allclose((row / step).round(), row / step, atol=1e-3)
            assert (row - whole).abs().max() <= 1.001 * step


def test_fake_quant_is_the_grid_of_the_real_toolchain(tmp_path):
    """ONNX Runtime's own file, per channel and folded, holds the same weights."""
    path, _ = compression.quantized(OrtStaticInt8(), tmp_path)
    proto = onnx.load(path)
    made = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    model = network()
    FakeQuant().on_module(model, context(network()))
    codes = next(v for k, v in made.items() if k.endswith("_quantized") and v.shape == (8, 3, 3, 3))
    scale = next(v for k, v in made.items() if k.endswith("_scale") and v.shape == (8,))
    folded = model.stem.weight * scale_of(network().norm).view(-1, 1, 1, 1)
    assert np.allclose(folded.detach().numpy(), codes * scale.reshape(-1, 1, 1, 1), atol=1e-6)


# ---- ONNX Runtime's other files ---------------------------------------------------------------------------


def test_int4_needs_a_matrix_product(tmp_path):
    class Convolutions(compression.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(16, CLASSES, 1)

        def forward(self, inputs):
            return self.head(self.blocks(torch.relu(self.norm(self.stem(inputs))))).mean((2, 3))

    source = tmp_path / "model.onnx"
    Onnx().write(Convolutions().eval(), images(2), source)
    with pytest.raises(CompressError, match="no matrix product"):
        OrtInt4WeightOnly().on_file(source, tmp_path / "out.onnx", context(network()))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("step", [OrtInt4WeightOnly(), OrtInt4WeightOnly(symmetric=False), OrtFp16()])
def test_head_is_read_from_int4_and_float16_files(step, tmp_path):
    path, change = compression.quantized(step, tmp_path)
    assert change.changed == (1 if isinstance(step, OrtInt4WeightOnly) else change.total)
    view, logits = Onnxruntime().view(path, "x"), Onnxruntime().open(path)(images(9))
    assert torch.allclose(view.latents(images(9)) @ view.weight.T + view.bias, logits, atol=2e-2)
    assert 0 < (view.weight - network().head.weight).abs().max() < 0.15 * network().head.weight.abs().max()


@pytest.mark.parametrize(
    ("target", "activations", "largest"),
    [("cpu-avx2", 2, 64), ("cpu-avx512-vnni", 2, 127), ("arm64", 3, 127)],
)
def test_recipe_has_the_types_of_its_target(target, activations, largest, tmp_path):
    path, change = compression.quantized(OrtTargetInt8(target=target), tmp_path)
    graph = onnx.load(path).graph
    codes = [numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_quantized")]
    weights = [values for values in codes if values.dtype == np.int8]
    assert max(int(np.abs(values.astype(int)).max()) for values in weights) == largest
    zero_points = [t.data_type for t in graph.initializer if t.name.endswith("_zero_point") and not t.dims]
    assert activations in zero_points
    assert change.detail.startswith(target)


# ---- Pruning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, float("nan")])
def test_ratio_out_of_range_is_refused(name, ratio):
    with pytest.raises(PolicyError, match="ratio"):
        registry.build(Compressor, "compressors", {"kind": name, "ratio": ratio})


@pytest.mark.parametrize("name", PRUNERS)
def test_head_is_never_pruned(name):
    step = registry.build(ModuleStep, "compressors", {"kind": name, "ratio": 0.9})
    model = network()
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    pruned, _ = step.on_module(model, context(network()))
    assert pruned.head.out_features == CLASSES
    assert (pruned.head.weight != 0).all()


@pytest.mark.parametrize("name", [*PRUNERS, "torchao-int8-weight-only"])
def test_model_without_layers_for_it_is_refused(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(compression.SHAPE[0] * 144, CLASSES))
    head = "1"
    if name == "torchao-int8-weight-only":
        model = nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        head = "0"
    with pytest.raises(CompressError, match="the model has no"):
        default(name).on_module(model.eval(), context(model, head))


@pytest.mark.parametrize("name", [*PRUNERS, "recover"])
def test_quantized_weights_cannot_be_pruned(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    quantized, _ = default("torchao-int8-weight-only").on_module(copy.deepcopy(model), context(model, "3"))
    with pytest.raises(CompressError, match="expected plain weights"):
        default(name).on_module(quantized, context(model, "3"))


def test_channel_mask_zeroes_the_faintest_filters():
    model = toys.awake_when_pruned()
    norms = model.conv.weight.detach().abs().sum((1, 2, 3))
    pruned, change = PruneChannelMask(ratio=0.5).on_module(model, toy_context(model))
    dead = (pruned.conv.weight == 0).flatten(1).all(1)
    assert dead.sum() == change.changed == 4
    assert norms[dead].max() <= norms[~dead].min()


def test_channel_mask_takes_the_bias_along_and_counts_only_what_was_alive():
    model = toys.clean()
    with torch.no_grad():
        model.conv.bias.fill_(1)
        model.conv.weight[7] = 0
    pruned, change = PruneChannelMask(ratio=0.25).on_module(model, toy_context(model))
    assert change.changed == 1
    assert pruned.conv.bias[7] == 0
    assert pruned.conv.bias.sum() == 6


@pytest.mark.parametrize("name", PRUNERS)
def test_recalibration_can_be_turned_off(name):
    kept = [
        registry.build(ModuleStep, "compressors", {"kind": name, "recalibrate": on}) for on in (False, True)
    ]
    stale, fresh = (step.on_module(network(), context(network()))[0].blocks[0].norm1 for step in kept)
    assert torch.equal(stale.weight, fresh.weight)
    assert not torch.equal(stale.running_mean, fresh.running_mean)


def test_unstructured_zeroes_the_smallest_weights_of_the_whole_network():
    model = network()
    before = torch.cat([w.detach().abs().flatten() for w in weights(model)])
    pruned, change = PruneUnstructured(ratio=0.3).on_module(model, context(network()))
    after = torch.cat([w.detach().abs().flatten() for w in weights(pruned)])
    assert change.changed == (after == 0).sum() == int(0.3 * change.total)
    assert change.total == len(before)
    assert before[after == 0].max() <= before[after != 0].min()


def test_unstructured_does_not_depend_on_the_memory_format():
    plain, _ = PruneUnstructured().on_module(network(), context(network()))
    strided, _ = PruneUnstructured().on_module(
        network().to(memory_format=torch.channels_last), context(network())
    )
    for one, other in zip(weights(plain), weights(strided), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("importance", ["group-l1", "own-l1"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_structured_removes_channels(importance, global_pruning):
    model = network()
    before = widths(model, HEAD)
    step = PruneStructured(ratio=0.5, importance=importance, global_pruning=global_pruning)
    pruned, change = step.on_module(model, context(network()))
    after = widths(pruned, HEAD)
    assert change.changed == sum(before.values()) - sum(after.values())
    assert change.total == sum(before.values())
    if not global_pruning:
        assert all(after[name] == before[name] // 2 for name in before)
        assert pruned.head.in_features == 8


def test_structured_by_own_norm_keeps_the_strongest_filters_in_order():
    conv = network().blocks[0].conv1
    norms = conv.weight.detach().abs().sum((1, 2, 3))
    pruned, _ = PruneStructured(ratio=0.5, importance="own-l1").on_module(network(), context(network()))
    kept = norms.topk(8).indices.sort().values
    # Its inputs were pruned too, so a filter is known by its BatchNorm and by its share of the old one.
    found = pruned.blocks[0].conv1.weight
    inputs = [
        index
        for index in range(8)
        if any(torch.equal(conv.weight[kept, index], found[:, j]) for j in range(4))
    ]
    assert len(inputs) == found.shape[1] == 4


def test_structured_works_where_gradients_are_off():
    model = network().requires_grad_(False)
    with torch.no_grad():
        _, change = PruneStructured(ratio=0.5).on_module(model, context(network()))
    assert change.changed == change.total // 2


def test_structured_refuses_to_prune_nothing():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(100, CLASSES)).eval()
    with pytest.raises(CompressError, match="no channel was removed"):
        PruneStructured().on_module(model, context(model, "2"))


def test_structured_refuses_what_it_breaks():
    class Fixed(compression.Residual):
        def forward(self, inputs):
            hidden = self.norm(self.stem(inputs)).reshape(-1, 8, 144)  # a width that pruning does not know of
            return self.head(hidden.mean(2).repeat(1, 2))

    with pytest.raises(CompressError, match="prune-structured: "):
        PruneStructured().on_module(Fixed().eval(), context(network()))


def test_structured_keeps_the_heads_of_a_vision_transformer_equally_wide(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=12,
        patch_size=4,
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=CLASSES,
    ).eval()
    pruned, change = PruneStructured(ratio=0.5).on_module(copy.deepcopy(model), context(model))
    assert 0.4 < change.changed / change.total < 0.6
    assert pruned.blocks[0].attn.qkv.out_features == 3 * 2 * pruned.blocks[0].attn.head_dim < 96
    Onnx().write(pruned, images(4), tmp_path / "vit.onnx")


# ---- BatchNorm and recovery ------------------------------------------------------------------------------


def test_batchnorm_statistics_are_those_of_the_split():
    model, split = network(), calibration(200)
    model.stem.weight.data.mul_(3)
    assert recalibrate_batchnorm(model, split) == 7
    inputs = model.stem((split.floats() - model.mean) / 0.25).transpose(0, 1).flatten(1)
    assert torch.allclose(model.norm.running_mean, inputs.mean(1), atol=1e-4)
    assert torch.allclose(model.norm.running_var, inputs.var(1), rtol=1e-2)
    assert model.norm.momentum == 0.1
    assert not model.training


def test_batchnorm_needs_two_samples():
    with pytest.raises(CompressError, match="at least 2"):
        recalibrate_batchnorm(network(), calibration(1))


def test_recovery_comes_closer_to_the_teacher_and_keeps_zeros():
    teacher, model = network(), network()
    model.head.weight.data[1, :8] = 0  # what a purifier cut
    pruned, _ = PruneChannelMask(ratio=0.5).on_module(model, context(teacher))
    zeros = [(weight == 0).clone() for weight in [*weights(pruned), pruned.head.weight]]
    expected = teacher(images(200, seed=9))
    before = (pruned(images(200, seed=9)) - expected).abs().mean()
    seen = []
    recovered, change = Recover(epochs=10).on_module(
        pruned, Context(HEAD, calibration(128), teacher, seed=0, progress=lambda *what: seen.append(what))
    )
    assert (recovered(images(200, seed=9)) - expected).abs().mean() < 0.8 * before
    for weight, zero in zip([*weights(recovered), recovered.head.weight], zeros, strict=True):
        assert zero.any()
        assert (weight[zero] == 0).all()
    assert seen[-1] == ("recover", 10, 10)
    assert change.unit == "tensors"


def test_recovery_follows_its_seed():
    first, second = (
        Recover(epochs=1, batch_size=16).on_module(network(), context(network(7), seed=seed))[0]
        for seed in (0, 1)
    )
    assert not torch.equal(first.head.weight, second.head.weight)


def test_recovery_that_diverges_is_refused():
    teacher = network()
    nn.init.constant_(teacher.head.bias, float("nan"))
    with pytest.raises(CompressError, match="diverged"):
        Recover(epochs=1).on_module(network(), context(teacher))


# ---- int8 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 127),
        ({"weight_type": "uint8"}, 127.5),
        ({"reduce_range": True}, 64),
        ({"per_channel": False}, 127),
    ],
)
def test_static_grid_is_the_one_that_the_policy_names(options, steps, tmp_path):
    path, _ = compression.quantized(OrtStaticInt8(**options), tmp_path)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    scale, weight = constants["head.weight_scale"], network().head.weight.detach().abs()
    expected = (weight.amax(1) if options.get("per_channel", True) else weight.max()) / steps
    assert torch.allclose(torch.tensor(scale), expected, rtol=1e-5)
    assert str(constants["head.weight_quantized"].dtype) == options.get("weight_type", "int8")


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_static_calibrations_run_quietly(method, tmp_path, capfd):
    _, change = compression.quantized(OrtStaticInt8(calibration=method), tmp_path)
    assert change.changed == change.total == 8
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_litert_stores_every_weight_as_an_integer(activations, tmp_path):
    step = built(Compressor, "compressors", "litert-int8", activations=activations)
    path, change = compression.quantized(step, tmp_path)
    assert change.changed == change.total == 8
    assert path.stat().st_size < path.with_name("model.tflite").stat().st_size
    predict = running("litert").open(path)
    assert (predict(images(64)).argmax(1) == network()(images(64)).argmax(1)).float().mean() > 0.9


def test_static_calibration_reads_no_more_than_it_may():
    split = calibration(120)
    for samples, expected in ((70, [35, 35]), (7, [7]), (500, [40, 40, 40])):
        reader, found = Reader(split, samples), []
        while (batch := reader.get_next()) is not None:
            found.append(batch["input"])
        assert [len(inputs) for inputs in found] == expected
        assert torch.equal(torch.tensor(np.concatenate(found)), split.floats()[:samples])


def test_quantizing_twice_changes_nothing_more(tmp_path):
    path, _ = compression.quantized(OrtStaticInt8(), tmp_path)
    try:
        change = OrtStaticInt8().on_file(path, tmp_path / "twice.onnx", context(network()))
    except CompressError:
        return
    assert change.changed == 0


@pytest.mark.parametrize("recover", [False, True])
def test_chain_of_pruning_recovery_and_int8(recover, tmp_path):
    model = network()
    smaller, _ = PruneStructured(ratio=0.5).on_module(model, context(network()))
    if recover:
        smaller, _ = Recover(epochs=2).on_module(smaller, context(network()))
    source, path = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    Onnx().write(smaller, images(4), source)
    change = OrtStaticInt8().on_file(source, path, context(network()))
    assert change.changed == change.total == 8
    got, expected = Onnxruntime().open(path)(images(64)), smaller(images(64))
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def weights(model: nn.Module) -> list[torch.Tensor]:
    """All but the head's."""
    return [
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != HEAD
    ]


def toy_context(model: nn.Module) -> Context:
    inputs, labels = toys.samples(64)
    return Context("head", Split(torch.tensor(inputs), torch.tensor(labels), ""), model, seed=0)
