"""What replay and warm search say of half-repaired models: `python -m benchmarks.evidence_replay MODEL...`.

Triggers are found on a backdoored model, without its trigger, and tried on versions of it that were repaired
in part: by a purifier that was stopped early or left a rest (--recipe), or by moving the weights part of the
way to what a purifier makes of the model (--toward) or to the clean network that the attack began with
(--clean), which chooses none: a given share of it (--share) or until a given ASR is left (--left). With
--reference, networks that are known to be clean are asked what the same triggers do to them.
benchmarks.evidence_replay_table prints what a policy makes of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import cards, datasets, stored
from benchmarks.benches import bench_of
from benchmarks.defences import HEAD, RECIPES
from benchmarks.evidence import LIMITS, SETTINGS
from benchmarks.purified import Shelf
from secure_export import digests
from secure_export.environment import versions
from secure_export.evidence import cold_searches, tried_again, work_of
from secure_export.evidence.calibration import calibrated
from secure_export.evidence.one import best_known
from secure_export.lane import Bench, at_the_head, through_settings
from secure_export.policy import EvidenceSpec, Setting
from secure_export.records.measured import SettingResult
from secure_export.records.searches import FoundTrigger, Search

RESULTS = Path(__file__).parent / "results" / "evidence-replay.json"


@torch.no_grad()
def between(bad: nn.Module, clean: nn.Module, share: float) -> nn.Module:
    """Every weight and statistic `share` of the way from `bad` to `clean`."""
    mixed, goal = copy.deepcopy(bad), clean.state_dict()
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            value.lerp_(goal[name], share)
    return mixed.eval()


def repaired(
    bad: nn.Module,
    target: int,
    clean: nn.Module | None,
    repairs: Sequence[Mapping[str, Any]],
    bench: Bench,
    shelf: Shelf,
) -> Iterator[tuple[Mapping[str, Any], nn.Module]]:
    """`bad` after every repair: `{"share": s}` of the way to `clean`, or to what a purifier makes of it if
    the repair says `toward`; or a purifier by its fields."""
    goals = {} if clean is None else {"": clean}
    for repair in repairs:
        if "kind" in repair:
            yield repair, shelf.purified(bad, target, repair, bench.splits.fit, bench.seed)
            continue
        toward = repair.get("toward", "")
        if toward not in goals:
            recipe = {"kind": toward, **RECIPES[toward]}
            goals[toward] = shelf.purified(bad, target, recipe, bench.splits.fit, bench.seed)
        if "share" in repair:
            yield repair, between(bad, goals[toward], repair["share"])
        else:
            share = share_that_leaves(repair["left"], bad, goals[toward], target, bench)
            yield {**repair, "share": round(share, 3)}, between(bad, goals[toward], share)


def made_already(row: Mapping[str, Any], repair: Mapping[str, Any], warm: bool) -> bool:
    """Whether a stored row is of this repair; how far `left` took it was found on the way."""
    told = {
        key: value for key, value in row["repair"].items() if key != "share" or "left" not in row["repair"]
    }
    return told == repair and (row.get("warm", True) or not warm)


@torch.no_grad()
def share_that_leaves(left: float, bad: nn.Module, clean: nn.Module, target: int, bench: Bench) -> float:
    """By bisection, for the trigger works less and less on the way."""
    holdout, (trigger,) = bench.splits.holdout, bench.triggers.values()
    stamped = trigger(holdout.floats(holdout.labels != target))
    low, high = 0.0, 1.0
    for _ in range(8):
        share = (low + high) / 2
        reached = between(bad, clean, share)(stamped).argmax(1) == target
        low, high = (share, high) if float(reached.float().mean()) > left else (low, share)
    return (low + high) / 2


def row(
    result: SettingResult, searches: Sequence[Search], originals: Sequence[Search], target: int
) -> dict[str, Any]:
    """One setting of one repaired model: the truth as counts, and every trigger that was tried."""
    before = {(search.probe, search.setting, t.aim): numbers(t) for search in originals for t in search.found}
    measured = result.measurement
    if measured is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else ""}
    asr = measured.triggers[0].asr[target]
    tried: dict[str, Any] = {}
    for search in searches:
        if search.setting == result.setting:
            tried[f"{search.mode} {search.probe}"] = {
                "found": [
                    {"class": t.target_class, "origin": t.origin}
                    | numbers(t)
                    | {"original": before[search.probe, t.origin, t.aim]}
                    for t in search.found
                    if t.lift is not None
                ],
                "excess": search.excess,
                "excess_class": search.excess_class,
                "seconds": search.seconds,
                "unsearched": search.unsearched,
            }
    return {
        "acc": [measured.acc.hits, measured.acc.total],
        "true_asr": [asr.hits, asr.total],
        "tried": tried,
    }


def numbers(found: FoundTrigger) -> dict[str, list[int]]:
    """What was counted on the holdout."""
    counted = {"lift": found.lift, "contrast": found.contrast}
    return {name: [one.gained, one.lost, one.total] for name, one in counted.items() if one is not None}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--clean", type=click.Path(path_type=Path, exists=True), help="what --share moves to")
@click.option(
    "--toward", type=click.Choice(tuple(RECIPES)), help="a purifier, whose result --share and --left move to"
)
@click.option("--share", "shares", multiple=True, type=float, help="of the way there")
@click.option("--left", "lefts", multiple=True, type=float, help="as far on the way as leaves this ASR")
@click.option(
    "--reference",
    "references",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="a network known to be clean",
)
@click.option("--recipe", "recipes", multiple=True, help="a purifier as JSON")
@click.option("--settings", default="fp32", show_default=True, help=f"of {', '.join(SETTINGS)}")
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/evidence", type=click.Path(path_type=Path))
@click.option("--kept", default="build/purified", type=click.Path(path_type=Path), help="purified models")
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path))
@click.option("--preset", default="fast", show_default=True)
@click.option("--samples", default=500, show_default=True, help="holdout samples that score a trigger")
@click.option("--warm/--no-warm", default=True, help="search on from what was found, too")
def main(**o: Any) -> None:
    """Search every one of MODELS once, then try what was found on repaired versions of it.

    A repair that is stored already is not made again.
    """
    if (o["shares"] or o["lefts"]) and o["clean"] is None and o["toward"] is None:
        raise click.UsageError("--share and --left are ways to another network: give --clean or --toward")
    torch.set_num_threads(1)
    spec = EvidenceSpec.model_validate(
        {
            "preset": o["preset"],
            "samples": o["samples"],
            "warm": "all" if o["warm"] else "none",
            "rules": tuple(LIMITS),
        }
    )
    data = datasets.cifar10(o["cache"])
    names = o["settings"].split(",")
    settings = [Setting(name, SETTINGS[name], {"kind": "onnx"}, False) for name in names]
    wanted: list[dict[str, Any]] = [{"share": s} for s in o["shares"]] + [{"left": a} for a in o["lefts"]]
    if o["toward"]:
        wanted = [one | {"toward": o["toward"]} for one in wanted]
    wanted += [json.loads(recipe) for recipe in o["recipes"]]
    clean_ones = [
        (path, cards.network(cards.read(path.with_suffix(".json")), path)) for path in o["references"]
    ]
    for path in o["models"]:
        card = cards.read(path.with_suffix(".json"))
        rows = stored.read(o["out"])["models"].get(path.stem, [])
        repairs = [one for one in wanted if not any(made_already(row, one, o["warm"]) for row in rows)]
        bench = bench_of(card, data, o["folder"] / f"{path.parent.name}-{path.stem}", o["samples"])
        work, model = work_of(spec, len(card["classes"]), bench), cards.network(card, path)
        original = at_the_head(model, HEAD, "original", digests.of_file(path), bench)
        searches = cold_searches(through_settings(original, settings, bench), work) if repairs else []
        known = {kind: best_known(searches, probe, work) for kind, probe in work.probes.items()}
        compared = [
            tried_again(through_settings(lined, settings, bench), known, work)
            for path, network in (clean_ones if repairs else ())
            for lined in [at_the_head(network, HEAD, "original", digests.of_file(path), bench)]
        ]
        clean = cards.network(cards.read(o["clean"].with_suffix(".json")), o["clean"]) if o["clean"] else None
        for repair, network in repaired(
            model, card["target_class"], clean, repairs, bench, Shelf(o["kept"], HEAD)
        ):
            identity = digests.of_state(network.state_dict())
            lined = at_the_head(network, HEAD, "purified", identity, bench, original.reference)
            results = through_settings(lined, settings, bench)
            tried = tried_again(results, known, work)
            if compared:
                tried = calibrated(tried, compared)
            target = card["target_class"]
            made = {result.setting: row(result, tried, searches, target) for result in results}
            told = {"sha256": card["sha256"], "target_class": card["target_class"]}
            line = {"repair": repair, "warm": o["warm"]} | told | {"settings": made}
            click.echo(f"{path.stem} {json.dumps(line)}", err=True)
            with stored.changed(o["out"]) as found:
                found["models"].setdefault(path.stem, []).append(line)
                found |= {
                    "preset": o["preset"],
                    "samples": o["samples"],
                    "seed": 0,
                    "versions": dict(versions()),
                }


if __name__ == "__main__":
    main()
