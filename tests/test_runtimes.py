"""Every runtime: a file as a function, and the head as it stands in the file."""

from __future__ import annotations

import functools
import io
import zipfile

import onnx
import pytest
import torch
from torch import nn

from secure_export import registry
from secure_export.compressors.ort_dynamic_int8 import OrtDynamicInt8
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.compressors.torchao_int8_dynamic import TorchaoInt8Dynamic
from secure_export.compressors.torchao_int8_weight_only import TorchaoInt8WeightOnly
from secure_export.compressors.torchao_pt2e_static_int8 import TorchaoPt2eStaticInt8
from secure_export.errors import CompressError, NoVerdict
from secure_export.formats import Format
from secure_export.formats.onnx import Onnx
from secure_export.formats.pt2 import Pt2
from secure_export.runtimes import Runtime
from secure_export.runtimes._cpu import cpu
from secure_export.runtimes.onnxruntime import Onnxruntime
from secure_export.runtimes.torch_eager import TorchEager, from_module
from tests import compression
from tests.compression import CLASSES, built, context, images, network, running

NAMES = registry.names("runtimes")


def reading(name: str) -> Runtime:
    """A runtime that locators can read heads with."""
    runtime = running(name)
    if not runtime.reads_heads:
        pytest.skip("its files are compiled")
    return runtime


def written(name: str, model: nn.Module, folder):
    """`model` in a format that the runtime `name` opens; weights alone speak of one architecture."""
    form = built(Format, "formats", forms(name)[0])
    if form.kind in compression.WEIGHTS_ALONE and type(model) is not compression.Residual:
        pytest.skip("its files hold weights alone")
    path = folder / f"model{form.suffix}"
    form.write(model, images(2), path)
    return path


def forms(name: str) -> list[str]:
    """Formats that the runtime `name` opens; at least one."""
    return [kind for kind in registry.names("formats") if registry.load("formats", kind).runtime == name]


# ---- Every runtime ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    @functools.cache
    def file(name: str):
        return written(name, network(), tmp_path_factory.mktemp(name))

    return file


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name, files):
    whole, pieces = (running(name, batch_size=size).open(files(name)) for size in (256, 3))
    logits = whole(images(8))
    assert logits.dtype == torch.float32
    assert logits.shape == (8, CLASSES)
    single = torch.cat([whole(images(8)[i : i + 1]) for i in range(8)])
    assert torch.allclose(single, logits, atol=1e-5)
    assert torch.allclose(pieces(images(8)), logits, atol=1e-5)
    assert whole(images(8)[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_view_is_the_head_of_the_model(name, files):
    view, model = reading(name).view(files(name), "fp32"), network()
    assert view.setting == "fp32"
    assert view.module is None
    assert torch.allclose(view.weight, model.head.weight, atol=1e-5)
    assert torch.allclose(view.bias, model.head.bias, atol=1e-5)
    assert torch.allclose(view.latents(images(9)) @ view.weight.T + view.bias, model(images(9)), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_twin_is_the_file_with_gradients_or_says_that_there_is_none(name, files):
    runtime, inputs = running(name), images(8).requires_grad_(True)
    if type(runtime).twin is Runtime.twin:
        with pytest.raises(CompressError, match=f"none for {name} files"):
            runtime.twin(files(name))
        return
    logits = runtime.twin(files(name))(inputs)
    assert torch.allclose(logits, runtime.open(files(name))(inputs.detach()), atol=1e-4)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), inputs)
    assert gradient.abs().sum() > 0


def test_twin_stands_behind_the_normalization_of_its_runtime(files):
    moments = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    normalizing = running("onnxruntime", **moments)
    logits = normalizing.open(files("onnxruntime"))(images(8))
    assert torch.allclose(normalizing.twin(files("onnxruntime"))(images(8)), logits, atol=1e-4)
    assert normalizing.view(files("onnxruntime"), "x").twin is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_file_is_refused(name, share, files, tmp_path):
    path = tmp_path / files(name).name
    path.write_bytes(files(name).read_bytes()[: int(share * files(name).stat().st_size)])
    for use in (lambda: running(name).open(path), lambda: running(name).view(path, "x")):
        with pytest.raises(NoVerdict, match=path.name) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_refused(name, tmp_path):
    with pytest.raises(CompressError, match=r"cannot read gone\.file"):
        running(name).open(tmp_path / "gone.file")


@pytest.mark.parametrize("name", NAMES)
def test_environment_is_plain_text(name):
    found = running(name, batch_size=7).environment()
    assert found["batch_size"] in ("1", "7")
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_view_needs_a_linear_last_layer(name, tmp_path):
    path = written(name, nn.Sequential(network(), nn.Softmax(1)).eval(), tmp_path)
    with pytest.raises(CompressError, match="cannot find the head"):
        reading(name).view(path, "x")


class ConvolutionHead(nn.Module):
    """1x1 convolution, then the mean over space."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(side))
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, inputs):
        return self.head(self.body(inputs)).mean((2, 3))


class NoBias(compression.Residual):
    """A head without bias becomes a MatMul in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES, bias=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [lambda: ConvolutionHead(1), lambda: ConvolutionHead(2), NoBias])
def test_view_of_other_heads(name, model, tmp_path):
    model = model().eval()
    view = reading(name).view(written(name, model, tmp_path), "x")
    assert torch.allclose(view.weight, model.head.weight.flatten(1), atol=1e-6)
    assert torch.allclose(view.latents(images(5)) @ view.weight.T + view.bias, model(images(5)), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_view_of_torchao_weights(name, tmp_path):
    model, _ = TorchaoInt8WeightOnly().on_module(network(), context(network()))
    if set(forms(name)) <= set(compression.WEIGHTS_ALONE):
        pytest.skip("its files hold plain weights alone")
    path = written(name, model, tmp_path)
    if name == "litert":  # it has quantizers of its own; torchao's become a product that no head is known by
        with pytest.raises(CompressError, match="cannot find the head"):
            reading(name).view(path, "x")
        return
    view = reading(name).view(path, "x")
    assert torch.allclose(view.latents(images(5)) @ view.weight.T + view.bias, model(images(5)), atol=1e-4)
    assert torch.allclose(view.weight, model.head.weight.dequantize(), atol=1e-6)


@pytest.mark.parametrize("step", [TorchaoInt8Dynamic(), TorchaoPt2eStaticInt8()])
def test_quantized_programs_are_measured_from_their_files(step, tmp_path):
    model, change = step.on_module(network(), context(network()))
    path = tmp_path / "model.pt2"
    Pt2().write(model, images(2), path)
    assert torch.equal(TorchEager().open(path)(images(9)), model(images(9)))
    assert 0 < (model(images(9)) - network()(images(9))).abs().max() < 1
    view = TorchEager().view(path, "x")
    scale = network().head.weight.abs().amax(1, keepdim=True) / 127
    assert 0 < ((view.weight - network().head.weight).abs() / scale).max() < 1.1
    assert change.changed == (8 if isinstance(step, TorchaoPt2eStaticInt8) else 1)


class RoundedLogits(nn.Module):
    """What XNNPACK's quantizer writes: the logits themselves go through int8."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(27, 4)

    def forward(self, x):
        import torchao.quantization.pt2e  # noqa: F401 - registers the operators

        kept = torch.ops.quantized_decomposed
        logits = self.head(self.body(x))
        rounded = kept.quantize_per_tensor(logits, 0.01, 0, -128, 127, torch.int8)
        return kept.dequantize_per_tensor(rounded, 0.01, 0, -128, 127, torch.int8)


def test_head_behind_rounded_logits_of_a_program_is_read_unrounded(tmp_path):
    torch.manual_seed(0)
    model, inputs, path = RoundedLogits().eval(), torch.rand(5, 3, 3, 3), tmp_path / "model.pt2"
    Pt2().write(model, inputs, path)
    view = TorchEager().view(path, "x")
    assert torch.equal(view.weight, model.head.weight)
    off = (view.latents(inputs) @ view.weight.T + view.bias - model(inputs)).abs().max()
    assert 1e-4 < off < 0.0051


# ---- ONNX Runtime ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        OrtStaticInt8(),
        OrtStaticInt8(per_channel=False, weight_type="uint8"),
        OrtStaticInt8(activation_type="int8"),
        OrtDynamicInt8(),
        OrtDynamicInt8(weight_type="uint8", per_channel=True),
    ],
)
@pytest.mark.parametrize(("optimization", "precise"), [("all", False), ("disabled", False), ("all", True)])
def test_view_reads_the_quantized_head(step, optimization, precise, tmp_path):
    path, _ = compression.quantized(step, tmp_path)
    runtime = Onnxruntime(optimization=optimization, precise=precise)
    view, logits = runtime.view(path, "int8"), runtime.open(path)(images(64))
    rebuilt = view.latents(images(64)) @ view.weight.T + view.bias
    one_step = (logits.max() - logits.min()) / 255
    assert (rebuilt - logits).abs().median() <= one_step
    exact = network().head.weight
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert 0 < (view.weight - exact).abs().max() < 1.1 * scale.max()
    if step == OrtStaticInt8():
        assert torch.allclose((view.weight / scale).round(), view.weight / scale, atol=1e-3)


def test_options_reach_the_session(tmp_path):
    runtime = Onnxruntime(optimization="basic", intra_op_threads=1, precise=True)
    session = runtime._session(compression.exported(), "model")
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_two_inputs_are_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "b"], ["logits"])],
        "sum",
        [value("a", 1, ["n", 3]), value("b", 1, ["n", 3])],
        [value("logits", 1, ["n", 3])],
    )
    path = tmp_path / "sum.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path
    )
    with pytest.raises(CompressError, match="2 inputs, expected one"):
        Onnxruntime().open(path)


def test_wrong_input_shape_is_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(compression.exported())
    with pytest.raises(CompressError, match=r"cannot run model\.onnx") as caught:
        Onnxruntime().open(path)(torch.rand(2, 3, 5, 5))
    assert "\n" not in str(caught.value)


def test_a_head_that_does_not_give_the_logits_is_refused(tmp_path):
    """A second path around the head must not go unnoticed."""

    class Bypassed(compression.Residual):
        def forward(self, inputs):
            return super().forward(inputs) + inputs.mean((2, 3)).repeat(1, 2)[:, :CLASSES]

    path = tmp_path / "model.onnx"
    Onnx().write(Bypassed().eval(), images(4), path)
    with pytest.raises(CompressError, match="head"):
        Onnxruntime().view(path, "x")


# ---- Eager -----------------------------------------------------------------------------------------------


def test_from_module_is_the_module():
    model = network().requires_grad_(True)
    logits = from_module(model, batch_size=3)(images(7))
    assert torch.allclose(logits, model(images(7)), atol=1e-5)
    assert not logits.requires_grad


class Marker:
    """Unpickling it would leave a file behind."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/weights/weight_0", "data/constants/custom_obj_0"]
)
def test_pt2_that_would_run_code_is_refused(member, tmp_path):
    path, marker, payload = tmp_path / "model.pt2", tmp_path / "ran", io.BytesIO()
    Pt2().write(network(), images(2), path)
    torch.save(Marker(marker), payload)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"archive/{member}"] = payload.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(NoVerdict, match=r"would import|does not write"):
        TorchEager().open(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni sse\n", "avx2 avx512_vnni"),
        ("processor : 0\nflags : fpu\n", None),
        ("processor : 0\nFeatures : asimd\n", None),
        (None, None),
    ],
)
def test_cpu_flags(text, expected, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert cpu(path) == expected if expected else cpu(path)
