"""What ways to choose the side of a rounding do to a backdoor that waits for int8.

    python -m benchmarks.rounding_cures build/zoo/qcb.json

Every file is ONNX Runtime's own static int8, its weights placed beforehand; ACC on test samples, ASR of the
card's trigger on those of other classes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cards, sources, stored
from benchmarks.locate_trials import opened, truth
from secure_export.environment import versions
from secure_export.lane import through_settings
from secure_export.policy import Setting

RESULT = Path(__file__).parent / "results" / "rounding-cures.json"
CURES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic-rounding": {"kind": "stochastic-rounding", "seed": 20240611},
    "flipped-rounding": {"kind": "flipped-rounding"},
    "efrap": {"kind": "efrap"},
    "efrap, error in steps": {"kind": "efrap", "in_steps": True},
}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--iterations", default=10_000, show_default=True, help="of efrap, a layer")
@click.option("--lr", default=1e-3, show_default=True, help="of efrap")
@click.option("--only", multiple=True, type=click.Choice(list(CURES)), help="these only")
@click.option("--test", default=2000, show_default=True, help="test samples")
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/rounding-cures", type=click.Path(path_type=Path))
@click.option("--out", default=RESULT, type=click.Path(path_type=Path))
def main(
    models: tuple[Path, ...],
    iterations: int,
    lr: float,
    only: tuple[str, ...],
    test: int,
    cache: Path,
    folder: Path,
    out: Path,
) -> None:
    """Quantize each of MODELS once a cure and add what the file does to the results."""
    torch.set_num_threads(1)
    for path in models:
        card = cards.read(path)
        data = sources.named(card.get("dataset", "cifar10"), cache, None)
        name = f"{path.parent.name}/{path.stem}"
        bench, _, lined = opened(path, card, data, folder / name.replace("/", "-"), test)
        for cure in only or CURES:
            step = dict(CURES[cure])
            if step.get("kind") == "efrap":
                step |= {"iterations": iterations, "lr": lr}
            steps = (*((step,) if step else ()), {"kind": "ort-static-int8"})
            began = time.process_time()
            (result,) = through_settings(lined, [Setting(cure, steps, {"kind": "onnx"}, False)], bench)
            # A file that lay there already cost nothing this time.
            spent = time.process_time() - began
            changes = result.artifact.changes if result.artifact else ()
            row = truth(result, card["target_class"]) | {
                "steps": steps,
                "turned": [[change.changed, change.total] for change in changes if change.unit == "weights"],
            }
            with stored.changed(out, {}) as found:
                about = {"sha256": card["sha256"], "attack": card["attack"], "rows": {}}
                rows = found.setdefault(name, about)["rows"]
                spent = max(spent, rows.get(cure, {}).get("cpu_seconds", 0))
                rows[cure] = row | {"cpu_seconds": round(spent, 1)}
                found["versions"] = dict(versions())
            click.echo(f"{name} {cure} {row}", err=True)


if __name__ == "__main__":
    main()
