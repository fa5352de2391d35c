"""What the searches of benchmarks.evidence cost: `python -m benchmarks.evidence_costs RESULTS`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click


def costs(run: Mapping[str, Any]) -> Iterable[str]:
    """Every search of a stored run, in passes of all triggered test images through the same file."""
    for name, about in run["models"].items():
        for setting, row in about["rows"].items():
            if row.get("asr_pass_seconds"):
                yardstick = row["asr_pass_seconds"]
                parts = {probe: one["seconds"] / yardstick for probe, one in row["probes"].items()}
                each = ", ".join(f"{probe} {cost:.1f}" for probe, cost in parts.items())
                yield f"{name} {setting}: {sum(parts.values()):.1f} passes of {yardstick:.1f} s ({each})"


@click.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path))
def main(results: Path) -> None:
    """Print the cost of every file's searches in RESULTS."""
    click.echo("\n".join(costs(json.loads(results.read_text()))))


if __name__ == "__main__":
    main()
