"""What references made on the spot still know: `python -m benchmarks.forgetting MODEL...`.

Of every model and the references of it: samples right on fit and on 500 test images, and triggered ones that
reach the target. References are to keep the task and to lose the trigger.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import cards, sources, stored
from benchmarks.benches import bench_of
from secure_export.environment import versions
from secure_export.forgetting import JUDGES, forgotten, references
from secure_export.lane import Bench

SAMPLES, SEEDS = 500, range(1 + JUDGES)
RESULTS = Path(__file__).parent / "results" / "forgetting.json"


@torch.no_grad()
def known(predict: Callable[[Tensor], Tensor], bench: Bench, target: int) -> dict[str, list[int]]:
    """Counts of (hits, total)."""

    def right(inputs: Tensor, labels: Tensor) -> list[int]:
        return [int((predict(inputs).argmax(1) == labels).sum()), len(labels)]

    fit, holdout = bench.splits.fit, bench.splits.holdout
    counts = {
        "fit": right(fit.floats(), fit.labels),
        "acc": right(holdout.floats(), holdout.labels),
    }
    for trigger in bench.triggers.values():
        stamped = trigger(holdout.floats(holdout.labels != target))
        counts["asr"] = right(stamped, torch.full((len(stamped),), target))
    return counts


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--noise", default=0.85, show_default=True)
@click.option("--steps", default=150, show_default=True)
@click.option("--dataset", default="cifar10", type=click.Choice(sources.NAMES))
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/forgetting", type=click.Path(path_type=Path))
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path))
def main(
    models: tuple[Path, ...], noise: float, steps: int, dataset: str, cache: Path, folder: Path, out: Path
) -> None:
    """Make the references of every model and add what they know to the results."""
    torch.set_num_threads(1)
    data = sources.named(dataset, cache, None)
    for path in models:
        card = cards.read(path.with_suffix(".json"))
        bench, model = bench_of(card, data, folder, SAMPLES), cards.network(card, path).eval()
        fit = bench.splits.fit
        made = [forgotten(model, fit, noise=noise, steps=steps, seed=seed) for seed in SEEDS]
        others = references(model, made, fit, least=0)
        asked: tuple[Callable[[Tensor], Tensor], ...] = (model, others.avoided, *others.judges)
        row = [known(one, bench, card["target_class"]) for one in asked]
        with stored.changed(out, {"rows": {}}) as found:
            found["rows"][f"{path.parent.name}/{path.stem} noise {noise:g}, {steps} steps"] = row
            found |= {"seeds": list(SEEDS), "versions": dict(versions())}
        cells = [", ".join(f"{name} {hits / of:.3f}" for name, (hits, of) in one.items()) for one in row]
        click.echo(f"{path.parent.name}/{path.stem}, noise {noise:g}, {steps} steps: " + " | ".join(cells))


if __name__ == "__main__":
    main()
