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
from secure_export.purifiers import Purifier
from secure_export.records.memory import Split


@dataclass(frozen=True)
class Shelf:
    """A folder of purified weights, each called after the model, the purifier, the samples and the seed."""

    folder: Path
    head: str

    def purify(
        self, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int
    ) -> nn.Module:
        """What a purifier makes of a copy of `model`, made anew and kept."""
        purifier = registry.build(Purifier, "purifiers", dict(recipe))
        made = purifier.purify(copy.deepcopy(model), self.head, target, fit, seed=seed).model
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in made.state_dict().items()}
        save_file(state, self._path(model, target, recipe, fit, seed))
        return made

    def purified(
        self, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int
    ) -> nn.Module:
        """The same from disk, if it is there."""
        path = self._path(model, target, recipe, fit, seed)
        if not path.is_file():
            return self.purify(model, target, recipe, fit, seed)
        made = copy.deepcopy(model)
        made.load_state_dict(load_file(path))
        return made.eval()

    def _path(self, model: nn.Module, target: int, recipe: Mapping[str, Any], fit: Split, seed: int) -> Path:
        purifier = registry.build(Purifier, "purifiers", dict(recipe))
        samples = digests.of_arrays(fit.inputs.numpy(), fit.labels.numpy())
        weights = digests.of_state(model.state_dict())
        name = digests.of_json(
            [weights, target, purifier.kind, purifier.model_dump(mode="json"), samples, seed]
        )
        return self.folder / f"{purifier.kind}-{name[:16]}.safetensors"
