"""An architecture by name, fresh weights: `timm:NAME`, `torchvision:NAME` or `package.module:factory`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from secure_export.errors import LoadError
from secure_export.factories import imported, local_code
from secure_export.words import described


def build(architecture: str, classes: int | None, input_shape: tuple[int, ...]) -> nn.Module:
    """The named architecture with `classes` outputs (None: its own default) for inputs of `input_shape`.

    Nothing is downloaded. The caller's random state is left as it was.

    Raises:
        LoadError: unknown name, missing package, or the architecture cannot be built this way.
    """
    family, _, name = architecture.partition(":")
    makers = {"timm": _timm, "torchvision": _torchvision}
    with torch.random.fork_rng(devices=[]):
        if family in makers:
            with local_code(f"{architecture} cannot be built for inputs {list(input_shape)}", LoadError):
                model = makers[family](name, classes, input_shape)
        else:
            model = _local(architecture, classes)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{architecture} gave a {type(model).__name__}, expected an nn.Module")
    return model


def _timm(name: str, classes: int | None, input_shape: tuple[int, ...]) -> Any:
    timm = _zoo("timm")
    # is_model knows no hub names ("hf-hub:..."), which would reach the network.
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if len(input_shape) != 3:
        return timm.create_model(name, **options)
    if input_shape[0] != 3:
        options["in_chans"] = input_shape[0]
    return _sized(timm.create_model, name, options, {"img_size": input_shape[1:]})


def _torchvision(name: str, classes: int | None, input_shape: tuple[int, ...]) -> Any:
    models = _zoo("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    options: dict[str, Any] = {"weights": None} | ({} if classes is None else {"num_classes": classes})
    size = {"image_size": input_shape[1]} if len(input_shape) == 3 else {}
    return _sized(models.get_model, name, options, size)


def _sized(create: Callable[..., Any], name: str, options: dict[str, Any], size: dict[str, Any]) -> Any:
    """Transformers fix their input size when they are built; convolutional networks do not take it."""
    try:
        return create(name, **options, **size)
    except TypeError:
        return create(name, **options)


def _local(architecture: str, classes: int | None) -> Any:
    factory = imported(architecture, LoadError)
    with local_code(f"{architecture} failed", LoadError):
        options = {} if classes is None or not _takes_classes(factory) else {"num_classes": classes}
        return factory(**options)


def _takes_classes(factory: Callable[..., Any]) -> bool:
    return "num_classes" in inspect.signature(factory).parameters


def _zoo(package: str) -> Any:
    try:
        return importlib.import_module(package)
    # torchvision beside a torch that it was not built for fails with a RuntimeError.
    except (ImportError, RuntimeError, OSError) as error:
        raise LoadError(
            f"{package} cannot be imported ({described(error)})", hint='pip install ".[zoo]" in the clone'
        ) from error


def _unknown(family: str, name: str, known: Sequence[str]) -> LoadError:
    close = difflib.get_close_matches(name, known, n=3)
    return LoadError(
        f"{family} has no classifier {name!r}", hint=f"did you mean {', '.join(close)}?" if close else ""
    )
