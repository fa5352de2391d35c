"""Triggers that an attack computes: stored beside the model, used by `secure-export run` through `custom`.

    triggers: [{name: lira, kind: custom, callable: "benchmarks.generated:lira"}]

The name behind the colon is a model of the zoo in the folder $SECURE_EXPORT_ZOO (default build/zoo).
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.attacks._poison import Apply
from secure_export.errors import DataError


def save(trigger: nn.Module, path: Path) -> None:
    """Write a trigger: its tensors, its class and the arguments that build it (`trigger.arguments`)."""
    made_by = f"{type(trigger).__module__}:{type(trigger).__name__}"
    metadata = {"class": made_by, "arguments": json.dumps(getattr(trigger, "arguments", {}))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in trigger.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.rename(path)


def load(path: Path) -> nn.Module:
    """A stored trigger, in eval mode.

    Raises:
        DataError: no such file, or one that names no class of benchmarks.attacks.
    """
    if not path.exists():
        raise DataError(f"no trigger {path}", hint="build the model, or set SECURE_EXPORT_ZOO to its folder")
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # not iterable
    module, _, attribute = metadata.get("class", "").partition(":")
    if not module.startswith("benchmarks.attacks."):
        raise DataError(f"{path}: got a trigger of class {module or 'nothing'}, expected benchmarks.attacks")
    build = getattr(importlib.import_module(module), attribute)
    found: nn.Module = build(**json.loads(metadata["arguments"]))
    found.load_state_dict(tensors)
    return found.eval().requires_grad_(False)


def stored_at(out: Path, name: str) -> Path:
    """Where the trigger of model `name` lies."""
    return out / f"{name}.trigger.safetensors"


def __getattr__(name: str) -> Apply:
    if name.startswith("_"):
        raise AttributeError(name)
    trigger = load(stored_at(Path(os.environ.get("SECURE_EXPORT_ZOO", "build/zoo")), name))

    def apply(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            triggered: Tensor = trigger(inputs)
        return triggered

    return apply
