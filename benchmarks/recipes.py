"""Is int8 by the name of a CPU faster than fp32 on this machine?

    python -m benchmarks.recipes resnet18_w16 mobilenetv2 vit_small

The files take turns, one thread, and processor time is counted, so that other programs disturb all alike.
Results go to benchmarks/results/recipes.json, with what the processor can do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import datasets, networks, stored
from benchmarks.artifacts import split
from secure_export import digests, heads, lane
from secure_export.environment import versions
from secure_export.lane import Bench, Lined
from secure_export.ledger import Ledger, user_key
from secure_export.measure import Reference
from secure_export.policy.schema import Setting
from secure_export.records.memory import Predictor, silent
from secure_export.runtimes import runtime
from secure_export.runtimes._cpu import cpu

RESULTS = Path(__file__).parent / "results" / "recipes.json"
TARGETS = ("cpu-avx512-vnni", "cpu-avx2", "arm64")
BATCHES, ROUNDS, WARM = (1, 16), 9, 2


@click.command()
@click.argument("names", nargs=-1)
@click.option("--data", default="build/data", type=click.Path(path_type=Path), help="Cache of CIFAR-10.")
@click.option("--table", is_flag=True, help="Print the stored results as Markdown; measure nothing.")
def main(names: tuple[str, ...], data: Path, table: bool) -> None:
    """Measure NAMES of benchmarks.networks, with fresh weights: they do not change the speed."""
    if not table:
        torch.set_num_threads(1)
        for name in names:
            times = measured(model(name), data)
            with stored.changed(RESULTS) as content:
                content["models"][name] = times
                content |= {"cpu": cpu(), "threads": 1, "rounds": ROUNDS, "versions": dict(versions())}
    click.echo(drawn(stored.read(RESULTS)))


def model(name: str) -> nn.Module:
    """The network, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return networks.named(name).eval()


def measured(network: nn.Module, data: Path) -> dict[str, Any]:
    """By file and batch size: median milliseconds of processor time per call."""
    splits = split(datasets.cifar10(data), 1, 32)
    head, classes = heads.find(network, (3, 32, 32))
    reference = Reference(torch.zeros(1, dtype=torch.long), torch.zeros(1, classes))
    lined = Lined("original", network, head, digests.of_state(network.state_dict()), reference)
    steps = {"fp32": ()} | {target: ({"kind": "ort-target-int8", "target": target},) for target in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            Path(folder), Ledger(Path(folder, "l"), versions(), user_key(silent)), splits, {}, {}, 0, silent
        )
        settings = [Setting(name, chain, {"kind": "onnx"}, True) for name, chain in steps.items()]
        files = {setting.name: lane.make(lined, setting, bench) for setting in settings}
        opened = {
            name: runtime(file.runtime, {"onnxruntime": {"intra_op_threads": 1}}).open(file.path)
            for name, file in files.items()
        }
        return {str(size): timed(opened, torch.rand(size, 3, 32, 32)) for size in BATCHES}


def timed(opened: Mapping[str, Predictor], inputs: torch.Tensor) -> dict[str, float]:
    """Every file in turn, ROUNDS times; medians in milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(WARM + ROUNDS):
        for name, predict in opened.items():
            began = time.process_time()
            predict(inputs)
            if turn >= WARM:
                taken[name].append(1000 * (time.process_time() - began))
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


def drawn(content: Mapping[str, Any]) -> str:
    """How many times faster than fp32, as Markdown."""
    lines = [
        "| network | batch | fp32, ms | " + " | ".join(TARGETS) + " |",
        "|---" * (3 + len(TARGETS)) + "|",
    ]
    for name, batches in content["models"].items():
        for size, times in batches.items():
            ratios = [f"{times['fp32'] / times[target]:.2f} ×" for target in TARGETS]
            lines.append(f"| {name} | {size} | {times['fp32']:.1f} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
