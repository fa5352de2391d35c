"""The first stage: a checkpoint of unknown origin and an architecture's name become the Subject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secure_export import architectures, channels, checkpoints, digests, heads
from secure_export.errors import LoadError, PolicyError
from secure_export.policy import SubjectSpec
from secure_export.records.memory import Subject

SHOWN = 5
"""Names that a message lists before it counts the rest."""


class Normalized(nn.Module):
    """`model` on (inputs - mean) / std: everything outside speaks raw inputs [N, C, ...] in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], input_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.model = model
        per_channel = (-1, *(1 for _ in input_shape[1:]))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(per_channel))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(per_channel))

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs [N, C, ...] to logits [N, classes]."""
        logits: Tensor = self.model((inputs - self.mean) / self.std)
        return logits


def load(
    path: Path,
    architecture: str,
    *,
    classes: int | None,
    head: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_shape: tuple[int, ...],
) -> Subject:
    """The model under test, in eval mode, from raw inputs of `input_shape` to `classes` logits.

    The file is read once: the digest is of the very bytes that become the weights. `classes` None reads the
    number off the head's weights; `head` None finds the head by tracing; without `mean` and `std` the
    architecture takes raw inputs itself. A checkpoint with a channel plan is loaded into the architecture
    cut by that plan.

    Raises:
        LoadError: the file, the architecture or their combination cannot become a classifier.
    """
    return from_bytes(
        _read(path),
        path,
        architecture,
        classes=classes,
        head=head,
        mean=mean,
        std=std,
        input_shape=input_shape,
    )


def check_named(path: Path, wanted: SubjectSpec) -> None:
    """Before anything else is read: is there a file, and an architecture to load it into?

    Raises:
        PolicyError: the policy names no architecture. LoadError: no such file.
    """
    if wanted.architecture is None:
        raise PolicyError(f"{path.name} needs an architecture", hint="give --arch, e.g. timm:resnet18")
    if not path.is_file():
        raise LoadError(f"no such model file: {path}")


def as_named(path: Path, wanted: SubjectSpec, input_shape: tuple[int, ...]) -> Subject:
    """load() with what a policy says of its subject: also for what stands beside it, as clean references.

    Raises:
        PolicyError, LoadError: as check_named() and load().
    """
    check_named(path, wanted)
    return load(
        path,
        wanted.architecture or "",
        classes=wanted.classes,
        head=wanted.head,
        mean=wanted.mean,
        std=wanted.std,
        input_shape=input_shape,
    )


def from_bytes(
    content: bytes,
    path: Path,
    architecture: str,
    *,
    classes: int | None,
    head: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_shape: tuple[int, ...],
) -> Subject:
    """As load(), from the bytes of the file that `path` names.

    Raises:
        LoadError: as load().
    """
    sha256 = hashlib.sha256(content).hexdigest()
    state = checkpoints.parse(content, path.name)
    plan = channels.read(content, path.name)

    def build(outputs: int | None) -> nn.Module:
        model = architectures.build(architecture, outputs, input_shape).float().eval()
        channels.narrow(model, plan, path.name)
        return model

    model = _fresh(build, classes, head, state, input_shape)
    _fill(model, state, f"{path.name} does not fit {architecture}")
    if mean is not None or std is not None:
        model = Normalized(model, *_moments(mean, std, input_shape), input_shape)
    # torch-pruning silently prunes nothing where parameters ask for no gradient.
    model.eval().requires_grad_(True)
    name, outputs = heads.find(model, input_shape, head)
    if classes is not None and outputs != classes:
        raise LoadError(f"the model has {outputs} outputs, expected {classes} classes")
    return Subject(
        model=model,
        input_shape=input_shape,
        classes=outputs,
        head=name,
        sha256=sha256,
        architecture=architecture,
        answers=answers(model, input_shape),
        source=path,
    )


@torch.no_grad()
def answers(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Digest of the logits on fixed noise, in thousandths: last bits differ between numbers of threads."""
    noise = torch.rand((2, *input_shape), generator=torch.Generator().manual_seed(0))
    return digests.of_arrays(model(noise).float().round(decimals=3).numpy())


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise LoadError(f"{path} is a folder, expected a checkpoint file")
    if not path.is_file():
        raise LoadError(f"no such model file: {path}")
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise LoadError(f"{path} cannot be read ({type(error).__name__})") from error


def _fresh(
    build: Callable[[int | None], nn.Module],
    classes: int | None,
    head: str | None,
    state: checkpoints.State,
    input_shape: tuple[int, ...],
) -> nn.Module:
    """The architecture with as many outputs as asked for, or as the checkpoint's head has."""
    model = build(classes)
    if classes is not None:
        return model
    try:
        name, outputs = heads.find(model, input_shape, head)
    except LoadError:
        # Fresh weights may not run at all; where the checkpoint fits, the loaded model is asked again.
        own = model.state_dict()
        if own.keys() == state.keys() and any(own[key].shape != state[key].shape for key in own):
            raise
        return model
    weight = state.get(f"{name}.weight")
    own_rows = model.get_submodule(name).get_parameter("weight")
    # Only the number of rows may differ: any other shape is a misfit, or a claim of absurd size.
    if weight is None or weight.shape[1:] != own_rows.shape[1:] or len(weight) in (0, outputs):
        return model
    return build(len(weight))


def _fill(model: nn.Module, state: checkpoints.State, what: str) -> None:
    """Copy `state` into `model`: every name, every shape, and only finite values."""
    own = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    # Older checkpoints lack BatchNorm's step counter, which nothing reads in eval mode.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    # Sorted, because safetensors lists names in another order each time.
    unexpected = sorted(key for key in state if key not in own)
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # Integers in the place of weights are quantized values without their scales.
    integers = [
        key
        for key in own
        if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    lists = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("shape of", shapes),
        ("integers in", integers),
    )
    problems = [f"{name} {_first(keys)}" for name, keys in lists if keys]
    if problems:
        raise LoadError(
            f"{what}: {'; '.join(problems)}",
            hint="name the architecture that the checkpoint was trained with",
        )
    with torch.no_grad():
        for key, tensor in own.items():
            if key in state:
                tensor.copy_(state[key])
    for key, tensor in own.items():
        if not tensor.isfinite().all():
            raise LoadError(f"{what}: {key} holds NaN or infinity")


def _first(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _moments(
    mean: Sequence[float] | None, std: Sequence[float] | None, input_shape: tuple[int, ...]
) -> tuple[Sequence[float], Sequence[float]]:
    if mean is None or std is None:
        raise LoadError("mean and std go together, got only one of them")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, input_shape[0]):
            raise LoadError(f"{name} has {len(values)} values, the inputs have {input_shape[0]} channels")
    if min(std) <= 0:
        raise LoadError(f"std must be above 0, got {list(std)}")
    return mean, std
