"""The main job's results as README gives them: `python -m benchmarks.main_table`."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results"
SHOWN = ("fp32", "int8")


@click.command()
@click.argument("results", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--setting", "names", multiple=True, default=SHOWN, help="these settings; globs")
def main(results: tuple[Path, ...], names: tuple[str, ...]) -> None:
    """Print one row for each model and setting of RESULTS, by default of results/main-job-*.json."""
    paths = results or tuple(sorted(RESULTS.glob("main-job-*.json")))
    click.echo("| model | setting | ACC original | ACC purified | ASR original | ASR purified | off | on |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for path in paths:
        result = json.loads(path.read_text())
        for setting in result["purification_on"]["report"]["settings"]:
            if any(fnmatch(setting, name) for name in names):
                click.echo(row(result, setting))
    for path in paths:
        click.echo(lifts(json.loads(path.read_text())))


def row(result: dict[str, Any], setting: str) -> str:
    """Accuracy, and ASR of the planted trigger into its target class, as counts and percent."""
    card, on = result["card"], result["purification_on"]
    lanes = on["report"]["settings"][setting]
    target, trigger = card["target_class"], "badnets"
    both = [lanes[lane] for lane in ("original", "purified")]
    cells = [lane.get("unmeasured") or count(lane["acc"]) for lane in both]
    cells += [
        "–" if "unmeasured" in lane else count(lane["triggers"][trigger]["asr"][target]) for lane in both
    ]
    outcomes = [result[key]["report"]["outcome"] for key in ("purification_off", "purification_on")]
    return f"| {result['model']} | {setting} | " + " | ".join([*cells, *outcomes]) + " |"


def lifts(result: dict[str, Any]) -> str:
    """The settings in which the planted trigger adds most for its class, both lanes."""
    target, text = result["card"]["target_class"], []
    for lane in ("original", "purified"):
        found = []
        for name, lanes in result["purification_on"]["report"]["settings"].items():
            if "unmeasured" in lanes[lane]:
                continue
            trigger = lanes[lane]["triggers"]["badnets"]
            gained, lost = trigger["lift"][target]
            found.append(((gained - lost) / trigger["asr"][target][1], name))
        shipped = max(lift for lift, name in found if name in SHOWN)
        most = ", ".join(f"{lift:.3f} {name}" for lift, name in sorted(found, reverse=True)[:3])
        text.append(f"{lane}: {shipped:.4f} shipped; most {most}")
    return f"lift, {result['model']}, " + "; ".join(text)


def count(pair: list[int]) -> str:
    """`3385/4000 (84.6 %)`."""
    hits, total = pair
    return f"{hits}/{total} ({100 * hits / total:.2f} %)"


if __name__ == "__main__":
    main()
