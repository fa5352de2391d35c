"""What known triggers do to the samples of one class alone, on networks whose truth is known.

    python -m benchmarks.source_lifts build/zoo-*/clean.json build/zoo-sixth/source-specific.json

A rule on `source_lift` needs a limit above what clean networks reach: some classes are near to each other,
and a warp or a blend carries samples of the one into the other. Every trigger of the policy is tried on every
class of every network, in the files of --settings; the results hold the largest lift on all other classes and
the largest on one, with the pair.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cards, datasets, sources, stored
from benchmarks.locate_trials import opened
from secure_export import digests, registry
from secure_export.environment import versions
from secure_export.lane import through_settings
from secure_export.policy import load_policy
from secure_export.records.measured import Measurement, Paired
from secure_export.triggers import Trigger

RESULT = Path(__file__).parent / "results" / "source-lifts.json"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--policy", "policy_path", default="policies/strict.yaml", type=click.Path(path_type=Path))
@click.option("--settings", default="fp32,int8", show_default=True, help="of the policy")
@click.option("--test", default=5000, show_default=True, help="test images that are counted")
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/source-lifts", type=click.Path(path_type=Path))
@click.option("--out", default=RESULT, type=click.Path(path_type=Path))
def main(
    models: tuple[Path, ...],
    policy_path: Path,
    settings: str,
    test: int,
    cache: Path,
    folder: Path,
    out: Path,
) -> None:
    """Try every trigger of a policy on the models whose cards are MODELS."""
    torch.set_num_threads(1)
    policy = load_policy(policy_path)
    chosen = [s for s in policy.expanded_settings() if s.name in settings.split(",")]
    triggers = {spec.name: registry.build(Trigger, "triggers", spec.plugin) for spec in policy.triggers}
    told = {spec.name: digests.of_json(spec.plugin) for spec in policy.triggers}
    loaded: dict[str, datasets.Images] = {}
    for path in models:
        card = cards.read(path)
        name, dataset = f"{path.parent.name}/{path.stem}", card.get("dataset", "cifar10")
        if dataset not in loaded:
            loaded[dataset] = sources.named(dataset, cache, None)
        bench, _, lined = opened(path, card, loaded[dataset], folder / name.replace("/", "-"), test)
        bench = replace(bench, triggers=triggers, trigger_digests=told)
        rows = {
            result.setting: row(result.measurement)
            for result in through_settings(lined, chosen, bench)
            if result.measurement is not None
        }
        with stored.changed(out) as found:
            found["models"][name] = {"sha256": card["sha256"], "test": test, "rows": rows}
            found |= {"policy": policy_path.name, "versions": dict(versions())}
        for setting, counts in rows.items():
            for trigger, worst in counts.items():
                click.echo(f"{name} {setting} {trigger}: {summary(worst)}")


def row(measurement: Measurement) -> dict[str, Any]:
    """By trigger: the largest lift on all other classes, and on one, as counts."""
    found: dict[str, Any] = {}
    for counts in measurement.triggers:
        c = max(range(len(counts.lift)), key=lambda k: counts.lift[k].difference)
        found[counts.trigger] = {"into": c, "lift": plain(counts.lift[c])}
        if counts.pairs:
            pair = max(counts.pairs, key=lambda one: one.lift.difference)
            found[counts.trigger]["pair"] = {
                "source": pair.source,
                "into": pair.into,
                "lift": plain(pair.lift),
            }
    return found


def plain(lift: Paired) -> list[int]:
    """Gained, lost, total."""
    return [lift.gained, lift.lost, lift.total]


def summary(worst: Any) -> str:
    """One line."""
    text = f"lift {Paired(*worst['lift']).difference:.3f} into {worst['into']}"
    if pair := worst.get("pair"):
        text += f"; {Paired(*pair['lift']).difference:.3f} from {pair['source']} into {pair['into']}"
    return text


if __name__ == "__main__":
    main()
