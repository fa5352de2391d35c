"""Purified models on disk, so that what one benchmark purified another need not: lmr-plus takes minutes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from secure_export import digests, registry
from secure_export.environment import versions
from secure_export.purifiers import Purifier
from secure_export.records.memory import Split


@dataclass(frozen=True)
class Shelf:
    """A folder of purified weights, called after all that made them: model, purifier, samples, seed, code."""

    folder: Path
    head: str

    def purified(
        self, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int
    ) -> nn.Module:
        """What a purifier makes of a copy of `model`: from disk, if it is there, or made and kept."""
        path = self._path(model, target, recipe, fit, seed)
        made = copy.deepcopy(model)
        if path.is_file():
            made.load_state_dict(load_file(path))
            return made.eval()
        purifier = registry.build(Purifier, "purifiers", dict(recipe))
        made = purifier.purify(made, self.head, target, fit, seed=seed).model
        self.keep(made, model, target, recipe, fit, seed)
        return made

    def keep(
        self, made: nn.Module, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int
    ) -> None:
        """Store what was made of `model`, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(model, target, recipe, fit, seed)
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in made.state_dict().items()}, partial)
        partial.rename(path)

    def _path(self, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int) -> Path:
        purifier = registry.build(Purifier, "purifiers", dict(recipe))
        samples = digests.of_arrays(fit.inputs.numpy(), fit.labels.numpy())
        made_of = [digests.of_state(model.state_dict()), self.head, target, samples, seed, dict(versions())]
        name = digests.of_json([purifier.kind, purifier.model_dump(mode="json"), *made_of])
        return self.folder / f"{purifier.kind}-{name[:16]}.safetensors"
