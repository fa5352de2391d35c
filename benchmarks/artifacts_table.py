"""What became of every format, as docs/artifacts.md gives it: `python -m benchmarks.artifacts_table`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from benchmarks.artifacts import RESULTS, STEPS


@click.command()
def main() -> None:
    """Print the stored results as Markdown; measure nothing."""
    click.echo(drawn(json.loads(RESULTS.read_text())["models"]))


def drawn(models: Mapping[str, Any]) -> str:
    """The stored results as Markdown: a table a model, and one for all that have fresh weights."""
    backdoored = {name: parts for name, parts in models.items() if "card" in parts["about"]}
    tables = [drawn_model(name, parts) for name, parts in backdoored.items()]
    fresh = {name: parts["settings"] for name, parts in models.items() if name not in backdoored}
    return "\n\n".join([*tables, *([drawn_support(fresh)] if fresh else [])])


def drawn_model(name: str, parts: Mapping[str, Any]) -> str:
    """Every setting and grid of one model of the zoo."""
    target_class = parts["about"]["card"].get("target_class")
    head = "| setting | ACC | ASR | agreement | logits apart | kB |"
    lines = [f"{name}:", "", head, "|---|---|---|---|---|---|"]
    order = list(STEPS)
    settings = sorted(parts.get("settings", {}).items(), key=lambda item: order.index(item[0]))
    for key, found in [*settings, *parts.get("grids", {}).items()]:
        if "unmeasured" in found:
            lines.append(f"| {key} | {why(found)} | | | | |")
            continue
        own = found["asr"].get("own")
        asr = percent(own[target_class]) if own and target_class is not None else "–"
        size = f"{found['bytes'] / 1000:,.0f}" if "bytes" in found else "–"
        apart = f"{found['logit_difference']:.2g}"
        lines.append(
            f"| {key} | {percent(found['acc'])} | {asr} | {percent(found['agreement'])} | {apart} | {size} |"
        )
    return "\n".join(lines)


def drawn_support(models: Mapping[str, Mapping[str, Any]]) -> str:
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
    """In one cell, why there is no file or no measurement."""
    return f"not made: {found['unmeasured'].split('. ')[0][:160]}".replace("|", "/")


def percent(count: Sequence[int]) -> str:
    """`61 % (224 of 368)`."""
    return f"{100 * count[0] / count[1]:.0f} % ({count[0]} of {count[1]})"


if __name__ == "__main__":
    main()
