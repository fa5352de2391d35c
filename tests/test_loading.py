"""A checkpoint of unknown origin: what loads, what is refused, and that nothing in it runs."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secure_export.errors import LoadError
from secure_export.loading import Normalized, load
from secure_export.records.memory import Subject

SHAPE = (3, 8, 8)
HERE = "tests.test_loading"


class Small(nn.Module):
    """A convolution, BatchNorm and a head whose name says nothing."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.readout = nn.Linear(6, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(self.norm(self.conv(inputs)).relu().mean((2, 3)))


class ConvHead(nn.Module):
    """A 1x1 convolution, averaged over positions; `clipped` puts a ReLU behind it."""

    def __init__(self, num_classes: int = 5, clipped: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.last = nn.Conv2d(6, num_classes, 1)
        self.then = nn.ReLU(inplace=True) if clipped else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.then(self.last(self.body(inputs).relu())).mean((2, 3))


class Scaled(Small):
    """The logits are no layer's output."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * 3


class Twice(Small):
    """Two layers give the same logits."""

    def __init__(self) -> None:
        super().__init__()
        self.echo = nn.Linear(5, 5, bias=False)
        nn.init.eye_(self.echo.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.echo(super().forward(inputs))


class Pair(Small):
    """Two outputs."""

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), inputs


def clipped() -> nn.Module:
    return ConvHead(clipped=True)


def one_output() -> nn.Module:
    return Small(1)


def crash() -> nn.Module:
    raise RuntimeError("no weights for you\nsecond line")


NOT_CALLABLE = 3


class Runs:
    """A pickle of this creates the file `marker` when it is loaded without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def loaded(path: Path, architecture: str = f"{HERE}:Small", **changes: Any) -> Subject:
    options = {"classes": None, "head": None, "mean": None, "std": None, "input_shape": SHAPE} | changes
    return load(path, architecture, **options)


def saved(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def pickled(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def exported(model: nn.Module, path: Path) -> Path:
    torch.export.save(torch.export.export(model.eval(), (torch.rand(1, *SHAPE),)), path)
    return path


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The zip at `path` with every member's bytes passed through `change(name below the root, bytes)`."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, change(name.partition("/")[2], content))
    return path


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small(7).eval()


# ---- What loads -----------------------------------------------------------------------------------------


def same(subject: Subject, model: nn.Module) -> bool:
    inputs = torch.rand(2, *SHAPE)
    return torch.allclose(subject.model(inputs), model(inputs), atol=1e-6)


def test_safetensors_becomes_the_subject(model: Small, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "m.safetensors")
    subject = loaded(path)
    assert same(subject, model)
    assert (subject.classes, subject.head, subject.input_shape) == (7, "readout", SHAPE)
    assert subject.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not subject.model.training
    assert all(parameter.requires_grad for parameter in subject.model.parameters())


@pytest.mark.parametrize("nest", ["plain", "state_dict", "model", "parallel", "compiled", "half", "legacy"])
def test_state_dicts_as_training_scripts_save_them(nest: str, model: Small, tmp_path: Path) -> None:
    state: Any = model.state_dict()
    if nest == "half":
        model.half().float()
        state = {key: tensor.half() for key, tensor in state.items()}
    elif nest in ("parallel", "compiled"):
        prefix = {"parallel": "module.", "compiled": "_orig_mod."}[nest]
        state = {"epoch": 3, "state_dict": {prefix + key: tensor for key, tensor in state.items()}}
    elif nest in ("state_dict", "model"):
        state = {nest: state}
    path = tmp_path / "m.pt"
    path.write_bytes(pickled(state, _use_new_zipfile_serialization=nest != "legacy"))
    assert same(loaded(path), model)


def test_an_exported_program_gives_its_weights_alone(model: Small, tmp_path: Path) -> None:
    assert same(loaded(exported(model, tmp_path / "m.pt2")), model)


def test_the_random_state_of_the_caller_stays(model: Small, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    loaded(path)
    assert torch.equal(before, torch.get_rng_state())


# ---- Nothing runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "raw", "raw protocol 2"])
def test_a_pickle_that_runs_code_is_refused_by_name(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable turns torch.load's own default off; it must not reach a file of unknown origin.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "ran", tmp_path / "m.pt"
    payload = {"conv.weight": torch.ones(2), "x": Runs(marker)}
    path.write_bytes(
        {
            "zip": lambda: pickled(payload),
            "legacy": lambda: pickled(payload, _use_new_zipfile_serialization=False),
            "raw": lambda: pickle.dumps(Runs(marker)),
            "raw protocol 2": lambda: pickle.dumps(Runs(marker), protocol=2),
        }[form]()
    )
    with pytest.raises(LoadError, match=r"would import posix\.system"):
        loaded(path)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["zip", "raw"])
@pytest.mark.parametrize("where", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0"])
def test_an_exported_program_that_runs_code_is_refused_by_name(
    form: str, where: str, model: Small, tmp_path: Path
) -> None:
    marker, path = tmp_path / "ran", exported(model, tmp_path / "m.pt2")
    code = pickled(Runs(marker)) if form == "zip" else pickle.dumps(Runs(marker))
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
    if where.startswith("data/constants"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{root}/{where}", code)
    else:
        rewritten(path, lambda name, content: code if name == where else content)
    with pytest.raises(LoadError, match=r"m\.pt2.* refused.*(posix\.system|an object)"):
        loaded(path)
    assert not marker.exists()


def test_a_pickled_weight_inside_an_exported_program_never_runs(model: Small, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", exported(model, tmp_path / "m.pt2")

    def plant(name: str, content: bytes) -> bytes:
        if name == "data/weights/weight_0":
            return pickled(Runs(marker))
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    with pytest.raises(LoadError, match=r"weight_0 is refused: its pickle would import posix\.system"):
        loaded(rewritten(path, plant))
    assert not marker.exists()


def test_torchscript_and_whole_modules_are_refused(model: Small, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(LoadError, match="TorchScript"):
        loaded(path)
    path.write_bytes(pickled(nn.Linear(2, 2)))
    with pytest.raises(LoadError, match=r"would import torch\.nn\.modules\.linear\.Linear") as caught:
        loaded(path)
    assert "state_dict" in caught.value.hint


# ---- Bombs ----------------------------------------------------------------------------------------------


def test_a_stride_of_zero_cannot_claim_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickled({"conv.weight": torch.ones(1).as_strided((1 << 20, 1 << 20), (0, 0))}))
    with pytest.raises(LoadError, match=r"conv\.weight claims 4398046511104 bytes"):
        loaded(path)


def test_a_compressed_archive_cannot_unpack_beyond_its_size(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickled({"conv.weight": torch.zeros(1 << 20)}))
    with pytest.raises(LoadError, match="unpacks to"):
        loaded(rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [{"as_int": 1 << 20}, {"as_int": 1 << 20}], "strides": [{"as_int": 0}] * 2}, "claims"),
        ({"storage_offset": {"as_int": 1 << 40}}, "its blob has"),
        ({"storage_offset": {"as_int": -4}}, "cannot be read"),
        ({"sizes": [{"as_name": "s0"}]}, "cannot be read"),
        ({"dtype": 10}, "cannot be read"),
    ],
)
def test_an_exported_program_cannot_read_beyond_its_blobs(
    change: dict[str, Any], message: str, model: Small, tmp_path: Path
) -> None:
    def plant(name: str, content: bytes) -> bytes:
        if not name.endswith("_weights_config.json"):
            return content
        table = json.loads(content)
        table["config"]["readout.weight"]["tensor_meta"] |= change
        return json.dumps(table).encode()

    with pytest.raises(LoadError, match=message):
        loaded(rewritten(exported(model, tmp_path / "m.pt2"), plant))


# ---- Damaged and wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pt2"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.98])
def test_a_truncated_file_is_one_clear_error(suffix: str, share: float, model: Small, tmp_path: Path) -> None:
    path = tmp_path / f"m.{suffix}"
    if suffix == "safetensors":
        saved(model, path)
    elif suffix == "pt":
        path.write_bytes(pickled(model.state_dict()))
    else:
        exported(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(LoadError, match=r"^m\.") as caught:
        loaded(path)
    assert "\n" not in caught.value.message
    assert "weights_only" not in caught.value.message


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such model file"):
        loaded(tmp_path / "none.pt")
    with pytest.raises(LoadError, match="is a folder"):
        loaded(tmp_path)


@pytest.mark.parametrize("value", [3, [torch.ones(2)], {}, {"a": 3}, {3: torch.ones(2)}])
def test_what_is_no_state_dict_is_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickled(value))
    with pytest.raises(LoadError, match="expected"):
        loaded(path)


def test_names_in_the_file_cannot_steer_the_terminal(model: Small, tmp_path: Path) -> None:
    save_file({"x\x1b[2Jy\n": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match="expected a named tensor") as caught:
        loaded(tmp_path / "m.safetensors")
    assert caught.value.message.isprintable()
    (tmp_path / "m.pt").write_bytes(b"\x80\x02cposix\x1b[2J\nsystem\n.")
    with pytest.raises(LoadError) as caught:
        loaded(tmp_path / "m.pt")
    assert caught.value.message.isprintable()


def test_a_head_of_a_billion_rows_and_no_columns_builds_nothing(model: Small, tmp_path: Path) -> None:
    state = model.state_dict() | {"readout.weight": torch.empty(1_000_000_000, 0)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"readout\.weight is \[1000000000, 0\]"):
        loaded(tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, model: Small, tmp_path: Path) -> None:
    with torch.no_grad():
        model.norm.running_var[2] = value
    with pytest.raises(LoadError, match=r"norm\.running_var holds NaN or infinity"):
        loaded(saved(model, tmp_path / "m.safetensors"))


def test_float64_that_overflows_float32_is_not_finite(model: Small, tmp_path: Path) -> None:
    state = {key: tensor.double() for key, tensor in model.state_dict().items()}
    state["conv.bias"][0] = 1e300
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"conv\.bias holds NaN or infinity"):
        loaded(tmp_path / "m.safetensors")


def test_a_wrong_architecture_names_what_does_not_fit(model: Small, tmp_path: Path) -> None:
    state = model.state_dict()
    state |= {f"layer{k}.weight": torch.ones(1) for k in range(8)}
    del state["conv.bias"], state["norm.num_batches_tracked"]
    state["conv.weight"] = torch.ones(6, 3, 5, 5)
    state["readout.bias"] = torch.ones(7, dtype=torch.int8)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(LoadError) as caught:
        loaded(tmp_path / "m.safetensors")
    message = caught.value.message
    assert "missing conv.bias;" in message
    assert "unexpected layer0.weight" in message
    assert "and 3 more" in message
    assert "shape of conv.weight is [6, 3, 5, 5], expected [6, 3, 3, 3]" in message
    assert "integers in readout.bias" in message
    assert "num_batches_tracked" not in message


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet18", "expected package.module:factory"),
        ("no.such.package:factory", "cannot import no.such.package:factory: ModuleNotFoundError"),
        (f"{HERE}:nothing", "cannot import .*: AttributeError"),
        (f"{HERE}:NOT_CALLABLE", "is a int, expected something to call"),
        (f"{HERE}:crash", "failed: RuntimeError: no weights for you$"),
        ("builtins:dict", "gave a dict, expected an nn.Module"),
    ],
)
def test_an_architecture_that_cannot_be_built(
    architecture: str, message: str, model: Small, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        loaded(saved(model, tmp_path / "m.safetensors"), architecture)


def test_a_factory_in_the_working_directory_is_found(
    tmp_path: Path, model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_net.py").write_text(f"from {HERE} import Small\n\ndef make():\n    return Small(7)\n")
    monkeypatch.chdir(tmp_path)
    assert same(loaded(saved(model, tmp_path / "m.safetensors"), "my_own_net:make"), model)


# ---- Head and outputs -----------------------------------------------------------------------------------


def test_the_number_of_classes_is_asked_for_or_read_off_the_head(model: Small, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "m.safetensors")
    assert loaded(path, classes=7).classes == loaded(path).classes == 7
    with pytest.raises(LoadError, match=r"readout\.weight is \[7, 6\], expected \[5, 6\]"):
        loaded(path, classes=5)


def test_a_convolution_can_be_the_head(tmp_path: Path) -> None:
    subject = loaded(saved(ConvHead(9), tmp_path / "m.safetensors"), f"{HERE}:ConvHead")
    assert (subject.head, subject.classes) == ("last", 9)


@pytest.mark.parametrize(
    ("factory", "message", "hint"),
    [
        ("clipped", "head last is followed by a ReLU", "must come last"),
        ("Scaled", "no Linear or 1x1 Conv2d produces the logits", "readout"),
        ("Twice", "2 layers produce the logits: readout, echo", "subject.head"),
        ("Pair", "gives a tuple, expected one tensor of logits", ""),
        ("one_output", "has 1 output, expected one per class", ""),
    ],
)
def test_a_model_without_one_head_is_refused(factory: str, message: str, hint: str, tmp_path: Path) -> None:
    path = saved(globals()[factory](), tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=message) as caught:
        loaded(path, f"{HERE}:{factory}")
    assert hint in caught.value.hint


def test_the_head_can_be_named_and_is_checked(tmp_path: Path) -> None:
    path = saved(Twice(), tmp_path / "m.safetensors")
    assert loaded(path, f"{HERE}:Twice", head="echo").head == "echo"
    wrapped = loaded(path, f"{HERE}:Twice", head="echo", mean=[0.5] * 3, std=[0.5] * 3)
    assert wrapped.head == "model.echo"
    with pytest.raises(LoadError, match="head 'conv' does not produce the logits"):
        loaded(path, f"{HERE}:Twice", head="conv")


def test_inputs_that_the_model_cannot_take(model: Small, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"cannot take inputs of shape \[1, 8, 8\]"):
        loaded(saved(model, tmp_path / "m.safetensors"), input_shape=(1, 8, 8))


# ---- Normalization --------------------------------------------------------------------------------------


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def test_normalization_is_inside(model: Small, tmp_path: Path) -> None:
    subject = loaded(saved(model, tmp_path / "m.safetensors"), mean=MEAN, std=STD)
    inputs = torch.rand(4, *SHAPE)
    by_hand = torch.stack([(inputs[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(copy.deepcopy(subject.model)(inputs), model(by_hand))
    assert subject.head == "model.readout"


def test_normalization_of_sound_is_per_channel() -> None:
    identity = Normalized(nn.Identity(), [1.0, 2.0], [1.0, 2.0], (2, 16))
    torch.testing.assert_close(identity(torch.full((3, 2, 16), 4.0))[0, :, 0], torch.tensor([3.0, 1.0]))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.1, 0.2], STD, "mean has 2 values, the inputs have 3 channels"),
        (MEAN, [0.1, 0.0, 0.1], "std must be above 0"),
        (MEAN, None, "go together"),
    ],
)
def test_normalization_that_does_not_fit(
    mean: Any, std: Any, message: str, model: Small, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        loaded(saved(model, tmp_path / "m.safetensors"), mean=mean, std=std)


def test_a_normalized_model_can_be_exported_and_pruned(model: Small, tmp_path: Path) -> None:
    import torch_pruning

    subject = loaded(saved(model, tmp_path / "m.safetensors"), mean=MEAN, std=STD)
    inputs = torch.rand(2, *SHAPE)
    program = torch.onnx.export(subject.model, (inputs,), dynamo=True, verbose=False)
    assert program is not None
    pruned = copy.deepcopy(subject.model)
    torch_pruning.pruner.BasePruner(
        pruned,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[pruned.get_submodule(subject.head)],
    ).step()
    assert pruned.get_submodule("model.conv").out_channels == 3
    assert pruned(inputs).shape == (2, 7)


# ---- The zoo --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("timm:resnet18", "model.fc"),
        ("timm:vit_tiny_patch16_224", "model.head"),
        ("torchvision:resnet18", "model.fc"),
        ("torchvision:mobilenet_v2", "model.classifier.1"),
    ],
)
def test_architectures_by_name(architecture: str, head: str, tmp_path: Path) -> None:
    family, _, name = architecture.partition(":")
    package = pytest.importorskip(family)
    if family == "timm":
        size = {"img_size": 32} if "vit" in name else {}
        original = package.create_model(name, num_classes=6, **size)
    else:
        original = package.models.get_model(name, num_classes=6)
    # save_model, because save_file refuses weights that share memory.
    path = saved(original.eval(), tmp_path / "m.safetensors")
    subject = loaded(path, architecture, input_shape=(3, 32, 32), mean=MEAN, std=STD)
    assert (subject.head, subject.classes) == (head, 6)
    inputs = torch.rand(2, 3, 32, 32)
    moments = [torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD)]
    torch.testing.assert_close(
        subject.model(inputs), original((inputs - moments[0]) / moments[1]), atol=1e-4, rtol=1e-4
    )


def test_squeezenet_is_refused_with_the_reason(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    path = saved(torchvision.models.squeezenet1_1(num_classes=6), tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"classifier\.1 is followed by a ReLU"):
        loaded(path, "torchvision:squeezenet1_1", input_shape=(3, 64, 64))


@pytest.mark.parametrize(
    "architecture", ["timm:resnet81", "timm:hf-hub:some/model", "torchvision:fcn_resnet50"]
)
def test_an_unknown_name_is_refused_without_a_download(
    architecture: str, model: Small, tmp_path: Path
) -> None:
    pytest.importorskip(architecture.partition(":")[0])
    with pytest.raises(LoadError, match="has no classifier"):
        loaded(saved(model, tmp_path / "m.safetensors"), architecture)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_a_missing_package_names_the_extra(
    family: str, model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, family, None)
    with pytest.raises(LoadError, match=f"{family} cannot be imported") as caught:
        loaded(saved(model, tmp_path / "m.safetensors"), f"{family}:resnet18")
    assert ".[zoo]" in caught.value.hint
