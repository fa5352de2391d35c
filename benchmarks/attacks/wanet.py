"""WaNet (Nguyen and Tran 2021): a fixed warp is the trigger; noise mode keeps other warps from being one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._poison import Apply, Poison, poison
from benchmarks.datasets import Images


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Poison,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds. `recipe.extra` is the cross ratio."""
    grid = sampled_at(trigger, *data.train_x.shape[2:]).to(data.train_x.device)

    def noisy(x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images under the warp with another jitter each, under their own labels (the paper's noise mode)."""
        jitter = torch.rand(len(x), *grid.shape[1:], generator=generator).to(x) * 2 - 1
        return F.grid_sample(x, (grid + jitter / x.shape[2]).clamp(-1, 1), align_corners=True), y

    return poison(model, data, trigger, target_class, recipe, work, log, seed=seed, extra=noisy)


def sampled_at(trigger: Apply, height: int, width: int) -> Tensor:
    """Grid [1, H, W, 2] that a warp samples at, read off the warped picture of its own coordinates."""
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1])[None]
    # Bilinear sampling of a linear function is exact.
    return trigger(coordinates).permute(0, 2, 3, 1) * 2 - 1
