"""What the searches without a trigger found, as a table and as rates: `python -m benchmarks.evidence_table`.

Reads benchmarks/results/evidence*.json and, of benchmarks/evidence_models.yaml, the limits and which clean
models are whose references.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import click
import numpy as np
import yaml

from benchmarks.evidence_files import File, files, narrowed, together
from secure_export.statistics import lower, upper

HERE = Path(__file__).parent
ALPHA = 0.05
DRAWS = 2000
"""Bootstrap draws of an AUC's interval."""


def auc(positive: Sequence[float], negative: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Area under the ROC curve, and its 95 % interval over bootstrap draws of either side."""
    generator, a, b = np.random.default_rng(seed), np.array(positive), np.array(negative)

    def area(p: np.ndarray, n: np.ndarray) -> float:
        return float((p[:, None] > n).mean() + 0.5 * (p[:, None] == n).mean())

    drawn = [area(generator.choice(a, len(a)), generator.choice(b, len(b))) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return area(a, b), float(low), float(high)


def rate(label: str, hits: int, total: int) -> str:
    """A count with both exact one-sided 95 % bounds."""
    if not total:
        return f"{label}: none measured"
    bounds = f"{100 * lower(hits, total, ALPHA):.1f} to {100 * upper(hits, total, ALPHA):.1f} %"
    return f"{label}: {hits} of {total} ({100 * hits / total:.1f} %; {bounds})"


def table(found: Sequence[File]) -> Iterable[str]:
    """One line a file."""
    kinds = sorted({kind for one in found for kind in (*one.found, *one.unsearched)})
    yield "| model | file | state | true lift | " + " | ".join(kinds) + " | flagged by |"
    yield "|" + "---|" * (5 + len(kinds))
    for one in found:
        cells = [shown(one, kind) for kind in kinds]
        flags = ", ".join(f"{probe} → {c}" for probe, c in one.flags.items()) or "–"
        true = "" if one.attack == "none" else f"{one.lift:.2f}"
        yield f"| {one.model} | {one.setting} | {one.state} | {true} | {' | '.join(cells)} | {flags} |"


def shown(one: File, kind: str) -> str:
    """A probe's finding."""
    if kind not in one.found:
        return "not searched" if kind in one.unsearched else ""
    value, named = one.found[kind]
    if kind == "rounding z":
        return f"{value:.1f}"
    if kind not in one.excess:
        return f"{value:.2f} → {named}"
    higher, into = one.excess[kind]
    return f"{value:.2f} → {named} ({higher:+.2f} → {into})"


def summary(found: Sequence[File]) -> Iterable[str]:
    """Detection, classes, false alarms, and each probe's AUC, of held-out files alone."""
    held = [one for one in found if one.held_out]
    awake = [one for one in held if one.state == "awake"]
    clean = [one for one in held if one.state == "clean" and one.asked]
    caught = [one for one in awake if one.flags]
    yield rate("awake files flagged", len(caught), len(awake))
    missed = [f"{one.model} {one.setting}" for one in awake if not one.flags]
    yield f"missed: {', '.join(missed) or 'none'}"
    right = sum(any(c in one.targets for c in one.flags.values()) for one in caught)
    yield rate("flagged with the right class", right, len(caught))
    alone = sum(all(c in one.targets for c in one.flags.values()) for one in caught)
    yield rate("flagged with the right class and no other", alone, len(caught))
    sleepers = {one.model for one in held if one.state == "asleep"}
    woken = {one.model for one in awake if one.model in sleepers and one.flags}
    yield rate("sleeping models flagged through a file in which they wake", len(woken), len(sleepers))
    yield rate("clean files with a false alarm", sum(bool(one.flags) for one in clean), len(clean))
    models = {one.model for one in clean}
    wrong = {one.model for one in clean if one.flags}
    yield rate("clean models with a false alarm on any file", len(wrong), len(models))
    for name, field in (("", "found"), (" above references", "excess")):
        read: Callable[[File], Mapping[str, tuple[float, int | None]]] = attrgetter(field)
        for kind in sorted({kind for one in held for kind in read(one)}):
            positive = [read(one)[kind][0] for one in awake if kind in read(one)]
            negative = [read(one)[kind][0] for one in clean if kind in read(one)]
            if positive and negative:
                area, low, high = auc(positive, negative)
                compared = f"n {len(positive)} and {len(negative)}"
                yield f"AUC of {kind}{name}: {area:.3f} ({low:.3f} to {high:.3f}), {compared}"


@click.command()
@click.argument("results", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--models", default=HERE / "evidence_models.yaml", type=click.Path(path_type=Path))
@click.option("--together", "joined", is_flag=True, help="one line a file over all presets of RESULTS")
@click.option("--probes", help="of these alone, with commas between: what a smaller preset would have found")
def main(results: tuple[Path, ...], models: Path, joined: bool, probes: str | None) -> None:
    """Print the tables and the rates of RESULTS, by default of every stored run of preset `wide`."""
    stored = results or (
        *sorted((HERE / "results").glob("evidence-zoo*.json")),
        HERE / "results/evidence-dev.json",
    )
    runs = [json.loads(path.read_text()) for path in stored]
    if probes:
        runs = [narrowed(run, probes.split(",")) for run in runs]
    found = files(runs, yaml.safe_load(models.read_text()))
    if joined:
        found = together(found)
    for heading, held in (("Held out:", True), ("Looked at while limits were set:", False)):
        if some := [one for one in found if one.held_out == held]:
            click.echo("\n".join([heading, "", *table(some), ""]))
    for line in summary(found):
        click.echo(f"- {line}")


if __name__ == "__main__":
    main()
