"""Models whose backdoors are known: `python -m benchmarks.zoo build NAME | list | check`.

Every model is `OUT/NAME.safetensors` (a plain state dict for normalized inputs) beside `OUT/NAME.json`, a card
that says how it was made and what was measured, as counts k of n on the whole test split.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import datasets, networks
from benchmarks.attacks.clean import clean
from benchmarks.datasets import Images
from benchmarks.measuring import Count, counts, percent
from secure_export import digests, registry
from secure_export.errors import DataError, SecureExportError
from secure_export.triggers import Trigger


def log(line: str) -> None:
    """Progress goes to stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Job:
    """What an attack needs: data, where to keep checkpoints, where finished models lie, and the seed."""

    data: Images
    work: Path
    out: Path
    seed: int

    def trained(self, name: str) -> nn.Module:
        """The finished model `name` in eval mode."""
        return load(self.out, name)


def load(out: Path, name: str) -> nn.Module:
    """Model `name` from `out`, in eval mode.

    Raises:
        DataError: it was not built.
    """
    path = out / f"{name}.safetensors"
    if not path.exists():
        raise DataError(f"no model {path}", hint=f"python -m benchmarks.zoo build {name}")
    model = _network()
    model.load_state_dict(load_file(path))
    return model.eval()


def store(model: nn.Module, path: Path) -> str:
    """Write the state dict, plain float32 in row-major order; returns the file's sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, partial)
    partial.rename(path)
    return digests.of_file(path)


def _network() -> nn.Module:
    return networks.resnet18_w16().to(memory_format=torch.channels_last)


def _clean(job: Job) -> tuple[nn.Module, float]:
    torch.manual_seed(job.seed)
    model = _network()

    def early(epoch: int) -> None:
        store(model, job.out / "clean.early.safetensors")
        log(f"epoch {epoch} acc {percent(counts(model, job.data.test_x, job.data.test_y)['acc'])}")

    seconds = clean(model, job.data, job.work, log, seed=job.seed, at_epoch=early)
    (job.out / "clean.early.safetensors").unlink(missing_ok=True)
    return model, seconds


BUILDERS: dict[str, Callable[[Job], tuple[nn.Module, float]]] = {"clean": _clean}


@click.group()
def main() -> None:
    """Build, list and check the zoo."""


@main.command()
@click.argument("name", type=click.Choice(sorted(BUILDERS)))
@click.option("--data", "source", type=click.Path(path_type=Path), help="folder of the CIFAR-10 archive")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/zoo"))
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=int, default=2)
def build(name: str, source: Path | None, out: Path, seed: int, threads: int) -> None:
    """Train model NAME, or go on where a killed training stopped."""
    torch.set_num_threads(threads)
    job = Job(datasets.cifar10(out.parent / "data", source), out / "checkpoints", out, seed)
    model, seconds = BUILDERS[name](job)
    store(model, out / f"{name}.safetensors")
    log(f"{name} done in {seconds:.0f}s")


if __name__ == "__main__":
    main()
