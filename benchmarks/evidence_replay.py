"""What replay and warm search say of half-repaired models: `python -m benchmarks.evidence_replay BAD CLEAN`.

The weights of a backdoored model are moved part of the way to the clean network that it was trained from,
which gives models of every true ASR between the two without choosing a purifier. Triggers are found on BAD,
without its trigger, and tried on each of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import cards, datasets
from benchmarks.defences import HEAD, load
from benchmarks.evidence import LIMITS, bench_of
from secure_export import digests
from secure_export.environment import versions
from secure_export.evidence import best_known, cold_searches, tried_again, work_of
from secure_export.lane import at_the_head, through_settings
from secure_export.policy import EvidenceSpec, Setting
from secure_export.records.searches import Search

FP32 = Setting("fp32", (), {"kind": "onnx"}, False)


@torch.no_grad()
def between(bad: nn.Module, clean: nn.Module, share: float) -> nn.Module:
    """Every weight and statistic `share` of the way from `bad` to `clean`."""
    mixed, goal = copy.deepcopy(bad), clean.state_dict()
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            value.lerp_(goal[name], share)
    return mixed.eval()


def tried(searches: Sequence[Search]) -> dict[str, Any]:
    """The largest lift of each mode and probe, with its class."""
    found: dict[str, Any] = {}
    for search in searches:
        scored = [(t.lift.difference, t.target_class) for t in search.found if t.lift is not None]
        lift, target = max(scored, default=(None, None))
        found[f"{search.mode} {search.probe}"] = {
            "lift": lift,
            "class": target,
            "unsearched": search.unsearched,
        }
    return found


@click.command()
@click.argument("bad", type=click.Path(path_type=Path))
@click.argument("clean", type=click.Path(path_type=Path))
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/evidence", type=click.Path(path_type=Path))
@click.option("--out", default="benchmarks/results/evidence-replay.json", type=click.Path(path_type=Path))
@click.option("--shares", default="0.2,0.3,0.4,0.5,0.6,0.8,1.0", show_default=True)
@click.option("--preset", default="fast", show_default=True)
@click.option("--samples", default=500, show_default=True, help="holdout samples that score a trigger")
def main(
    bad: Path, clean: Path, cache: Path, folder: Path, out: Path, shares: str, preset: str, samples: int
) -> None:
    """Search BAD once, then try what was found on models between BAD and CLEAN."""
    torch.set_num_threads(1)
    spec = EvidenceSpec.model_validate({"preset": preset, "samples": samples, "rules": tuple(LIMITS)})
    data, card = datasets.cifar10(cache), cards.read(bad.with_suffix(".json"))
    bench = bench_of(card, data, folder / f"{bad.parent.name}-{bad.stem}", samples)
    work, model, goal = work_of(spec, len(card["classes"]), bench), load(bad, card), load(clean, card)
    original = at_the_head(model, HEAD, "original", digests.of_file(bad), bench)
    searches = cold_searches(through_settings(original, [FP32], bench), work)
    known = {kind: best_known(searches, probe, work) for kind, probe in work.probes.items()}
    rows = []
    for share in map(float, shares.split(",")):
        mixed = between(model, goal, share)
        identity = digests.of_state(mixed.state_dict())
        lined = at_the_head(mixed, HEAD, "purified", identity, bench, original.reference)
        (result,) = through_settings(lined, [FP32], bench)
        asr = result.measurement.triggers[0].asr[card["target_class"]] if result.measurement else None
        found = tried(tried_again([result], known, work))
        rows.append({"share": share, "true_asr": [asr.hits, asr.total] if asr else None, "tried": found})
        click.echo(json.dumps(rows[-1]), err=True)
    content = {"bad": bad.stem, "preset": preset, "samples": samples, "seed": 0, "rows": rows}
    out.write_text(json.dumps(content | {"versions": dict(versions())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
