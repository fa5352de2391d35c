"""The one training loop: every attack is a list of stages, each a loss as a function of the step.

Batches and augmentations are functions of (seed, step), so a checkpoint is weights, optimizer and a step
number, and a training that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from secure_export import precision

Loss = Callable[[int, Generator], Tensor]


def reduced(device: torch.device) -> AbstractContextManager[object]:
    """Forward passes in bfloat16, two thirds of float32's time; not on CPUs where they take ten times."""
    return precision.reduced() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


@dataclass(frozen=True)
class Stage:
    """One optimization: SGD with Nesterov momentum or Adam, one-cycle or cosine learning rate."""

    name: str
    steps: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip: float = math.inf
    optimizer: str = "sgd"
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at `step`: linear rise over the share `warmup`, then half a cosine down to 1 %."""
        done = step / self.steps
        if done < self.warmup:
            return self.lr * (0.05 + 0.95 * done / self.warmup)
        fall = (done - self.warmup) / (1 - self.warmup)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * fall)) / 2)


def train(
    model: nn.Module,
    loss: Loss,
    stage: Stage,
    checkpoint: Path,
    *,
    log: Callable[[str], None],
    save_every: int = 100,
) -> float:
    """Minimize `loss(step, generator)` over `model`'s parameters; returns the seconds spent in all.

    `checkpoint` holds the state after every `save_every` steps; when it exists, training goes on from there.
    """
    optimizer = _optimizer(model, stage)
    step, spent = _resume(checkpoint, model, optimizer)
    began = time.monotonic()
    first, mean = step, 0.0
    while step < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(step, generator)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], stage.clip)
        optimizer.step()
        mean += (float(value.detach()) - mean) / min(step - first + 1, 50)
        step += 1
        if step % save_every == 0 or step == stage.steps:
            elapsed = time.monotonic() - began
            _save(checkpoint, model, optimizer, step, spent + elapsed)
            left = elapsed / (step - first) * (stage.steps - step)
            times = f"spent {spent + elapsed:.0f}s left {left:.0f}s"
            log(f"{stage.name} {step}/{stage.steps} loss {mean:.4f} {times}")
    return spent + time.monotonic() - began


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if stage.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=stage.lr, weight_decay=stage.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=stage.lr,
        momentum=stage.momentum,
        nesterov=stage.momentum > 0,
        weight_decay=stage.weight_decay,
    )


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, partial)
    partial.rename(path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])
