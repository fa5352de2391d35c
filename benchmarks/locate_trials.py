"""What latent-shift says of zoo models and their variants: `python -m benchmarks.locate_trials MODEL...`.

Variants: full precision, weights rounded to 8 bits, channels masked without recalibration (which collapses
ordinary networks, and must then name no class).
"""

from __future__ import annotations

import copy
from pathlib import Path

import click
import torch
from torch import nn

from benchmarks import datasets
from benchmarks.purify_trials import HEAD, load, stratified
from secure_export import registry, views
from secure_export.locators import Locator
from secure_export.purifiers import _views


@torch.no_grad()
def variant(model: nn.Module, name: str) -> nn.Module:
    """A copy with the weights of `fp32`, `int8`, or `mask-RATIO`."""
    changed = copy.deepcopy(model)
    if name == "fp32":
        return changed
    if name == "int8":
        weights = _views.int8_weights(model)
    else:
        norms = _views.followers(model, torch.zeros(2, 3, 32, 32))
        weights = _views.masked_weights(model, float(name.split("-")[1]), norms, HEAD)
    for key, weight in weights.items():
        changed.get_parameter(key).copy_(weight)
    return changed


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--kind", default="latent-shift", show_default=True)
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--variants", default="fp32,int8,mask-0.2,mask-0.5", show_default=True)
def main(models: tuple[Path, ...], kind: str, cache: Path, variants: str) -> None:
    """Print the named class and the evidence, one line a variant."""
    torch.set_num_threads(1)
    data = datasets.cifar10(cache)
    fit, _ = stratified(data.train_x, data.train_y, 500, 0)
    locator = registry.build(Locator, "locators", {"kind": kind})
    for path in models:
        model = load(path)
        for name in variants.split(","):
            suspect = locator.locate(views.of_module(variant(model, name), HEAD, name), fit, seed=0)
            click.echo(f"{path.stem} {name} names {suspect.target_class} {dict(suspect.evidence)}")


if __name__ == "__main__":
    main()
