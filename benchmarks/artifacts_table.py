"""What became of every format, as docs/artifacts.md gives it: `python -m benchmarks.artifacts_table`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from benchmarks.artifacts import RESULTS, STEPS


@click.command()
def main() -> None:
    """Print the stored results as Markdown; measure nothing."""
    click.echo(drawn(json.loads(RESULTS.read_text())["models"]))


def drawn(models: Mapping[str, Any]) -> str:
    """The stored results as Markdown: a table of the zoo's models, and one of networks with fresh weights."""
    trained = {name: parts for name, parts in models.items() if "card" in parts["about"]}
    fresh = {name: models[name]["settings"] for name in sorted(models) if name not in trained}
    tables = [drawn_trained(trained)] if trained else []
    return "\n\n".join([*tables, drawn_fresh(fresh)] if fresh else tables)


def drawn_trained(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Every setting and grid: accuracy, ASR of the model's own trigger, agreement; the file's size."""
    lines = [
        "| setting | " + " | ".join(f"{name}: ACC | ASR | agreement | apart" for name in models) + " | kB |",
        "|---" * (2 + 4 * len(models)) + "|",
    ]
    grids = dict.fromkeys(key for parts in models.values() for key in parts.get("grids", {}))
    for part, keys in (("settings", STEPS), ("grids", grids)):
        for key in keys:
            rows = {name: parts.get(part, {}).get(key) for name, parts in models.items()}
            cells = [counts(found, models[name]["about"]["card"]) for name, found in rows.items()]
            sizes = {f"{found['bytes'] / 1000:,.0f}" for found in rows.values() if found and "bytes" in found}
            lines.append(f"| {key} | {' | '.join(cells)} | {' / '.join(sorted(sizes)) or '–'} |")
    return "\n".join(lines)


def counts(found: Mapping[str, Any] | None, card: Mapping[str, Any]) -> str:
    """Four cells of one model."""
    if found is None or "unmeasured" in found:
        return f"{'not tried' if found is None else why(found)} | – | – | –"
    own, target_class = found["asr"].get("own"), card["target_class"]
    asr = percent(own[target_class]) if own and target_class is not None else "–"
    apart = f"{found['logit_difference']:.2g}"
    return f"{percent(found['acc'])} | {asr} | {percent(found['agreement'])} | {apart}"


def drawn_fresh(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What becomes of each network: largest logit difference, samples of the same class, size."""
    lines = ["| setting | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for setting in STEPS:
        cells = []
        for settings in models.values():
            found = settings.get(setting)
            if found is None:
                cells.append("not tried")
            elif "unmeasured" in found:
                cells.append(why(found))
            else:
                hits, total = found["agreement"]
                apart, size = found["logit_difference"], found["bytes"] / 1e6
                cells.append(f"{apart:.2g}; {hits} of {total}; {size:.1f} MB")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def why(found: Mapping[str, Any]) -> str:
    """In one cell, why there is no file or no measurement; of torch's exporter, which operator it lacks."""
    lacks = re.search(r"cannot export to ONNX: .*\btorch\.ops\.(\w+\.\w+)", found["unmeasured"])
    if lacks:
        return f"not made: torch cannot export `{lacks[1]}`"
    return f"not made: {found['unmeasured'].split('. ')[0][:160]}".replace("|", "/")


def percent(count: Sequence[int]) -> str:
    """`61 % (224 of 368)`."""
    return f"{100 * count[0] / count[1]:.0f} % ({count[0]} of {count[1]})"


if __name__ == "__main__":
    main()
