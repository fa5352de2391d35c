"""What replay and warm search say of half-repaired models: `python -m benchmarks.evidence_replay MODEL...`.

Triggers are found on a backdoored model, without its trigger, and tried on versions of it that were repaired
in part: by a purifier that was stopped early or left a rest (--recipe), or by moving the weights part of the
way to the clean network that the attack began with (--clean), a given share of it (--share) or until a given
ASR is left (--left), which chooses no purifier. With --reference, networks that are known to be clean are
asked what the same triggers do to them. What a policy's rules on replay and warm search say of each repair
is added by `--table`.
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

from benchmarks import cards, datasets
from benchmarks.defences import HEAD, load
from benchmarks.evidence import LIMITS, SETTINGS, bench_of
from secure_export import digests, registry
from secure_export.environment import versions
from secure_export.evidence import cold_searches, tried_again, work_of
from secure_export.evidence.calibration import calibrated
from secure_export.evidence.one import best_known
from secure_export.lane import Bench, at_the_head, through_settings
from secure_export.policy import EvidenceSpec, Policy, Setting, load_policy
from secure_export.policy._readings import Reading, decide
from secure_export.purifiers import Purifier
from secure_export.records.measured import Paired, SettingResult
from secure_export.records.searches import FoundTrigger, Search

RESULTS = Path(__file__).parent / "results" / "evidence-replay.json"
BLIND = Path(__file__).parents[1] / "policies" / "blind.yaml"


@torch.no_grad()
def between(bad: nn.Module, clean: nn.Module, share: float) -> nn.Module:
    """Every weight and statistic `share` of the way from `bad` to `clean`."""
    mixed, goal = copy.deepcopy(bad), clean.state_dict()
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            value.lerp_(goal[name], share)
    return mixed.eval()


def repaired(
    bad: nn.Module, target: int, clean: nn.Module | None, repairs: Sequence[Mapping[str, Any]], bench: Bench
) -> Iterator[tuple[Mapping[str, Any], nn.Module]]:
    """`bad` after every repair: `{"share": s}` of the way to `clean`, or a purifier by its fields."""
    for repair in repairs:
        if clean is not None and "share" in repair:
            yield repair, between(bad, clean, repair["share"])
        elif clean is not None and "left" in repair:
            share = share_that_leaves(repair["left"], bad, clean, target, bench)
            yield repair | {"share": round(share, 3)}, between(bad, clean, share)
        elif "kind" in repair:
            purifier = registry.build(Purifier, "purifiers", dict(repair))
            made = purifier.purify(copy.deepcopy(bad), HEAD, target, bench.splits.fit, seed=bench.seed)
            yield repair, made.model


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
    before = {
        (search.probe, search.setting, t.target_class): numbers(t)
        for search in originals
        for t in search.found
    }
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
                    | {"original": before[search.probe, t.origin, t.target_class]}
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


def evident(trigger: Mapping[str, Any], probe: str, spec: EvidenceSpec) -> bool:
    """Whether a trigger broke a rule of the policy on the original file, or may have: it is not stored."""
    original = trigger.get("original")
    if original is None:
        return True
    counted = {reading: Paired(*counts).difference for reading, counts in original.items()}
    return spec.broken(Setting(trigger["origin"], (), {"kind": "onnx"}, True), probe, counted)


def said(settings: Mapping[str, Any], policy: Policy) -> str:
    """What the policy's rules on replay and warm search make of a repair: refused, undecided or passed.

    Or that there was nothing to try, for nothing that was found on the original broke a rule.
    """
    spec = policy.evidence
    outcomes: list[bool | None] = []
    natural = 0
    for rule in spec.rules if spec else ():
        if spec is None or rule.mode not in ("replay", "warm"):
            continue
        probes = spec.read_by(rule)
        for one in settings.values():
            tried = [one.get("tried", {}).get(f"{rule.mode} {probe}", {}) for probe in probes]
            if rule.reading == "excess":
                readings = [Reading("", t["excess"], 1) for t in tried if t.get("excess") is not None]
                outcomes += [None] * (len(tried) - len(readings))
            else:
                found = {probe: t.get("found") or () for probe, t in zip(probes, tried, strict=True)}
                triggers = [(t, probe) for probe, some in found.items() for t in some]
                read = [t for t, probe in triggers if not rule.evident or evident(t, probe, spec)]
                natural += len(triggers) - len(read)
                counted = [t.get(rule.reading) for t in read]
                readings = [Reading("", Paired(*value), value[2]) for value in counted if value]
                outcomes += [None] * (counted.count(None) + sum(not some for some in found.values()))
            alpha = (1 - policy.confidence) / max(1, len(readings))
            outcomes += [decide(reading, rule, alpha).passed for reading in readings]
    if natural and not outcomes:
        return "nothing to try"
    return "refused" if False in outcomes else "passed" if outcomes and all(outcomes) else "undecided"


def asked(policy: Policy, mode: str) -> tuple[str, ...]:
    """The probes whose lifts the policy's rules read in this mode."""
    spec = policy.evidence
    rules = [r for r in spec.rules if r.mode == mode and r.reading == "lift"] if spec else []
    read = [spec.read_by(rule) for rule in rules if spec]
    return tuple(dict.fromkeys(probe for probes in read for probe in probes))


def largest(one: Mapping[str, Any], mode: str, probes: Sequence[str]) -> str:
    """`l2 0.33 → 1`: the largest lift of one way of trying, of these probes."""
    lifts = [
        (Paired(*found["lift"]).difference, found["class"], probe)
        for probe in probes
        for found in one["tried"].get(f"{mode} {probe}", {}).get("found", ())
    ]
    if not lifts:
        return "–"
    lift, into, probe = max(lifts)
    return f"`{probe}` {lift:.2f} → {into}"


def evident_ones(one: Mapping[str, Any], mode: str, spec: EvidenceSpec) -> list[tuple[str, Any]]:
    """(probe, trigger) of what broke a rule on the original and was tried again in this mode."""
    read = dict.fromkeys(
        probe for rule in spec.rules if rule.evident and rule.mode == mode for probe in spec.read_by(rule)
    )
    tried = [(probe, one["tried"].get(f"{mode} {probe}", {}).get("found", ())) for probe in read]
    return [
        (probe.removeprefix("contrast-"), trigger)
        for probe, found in tried
        for trigger in found
        if evident(trigger, probe, spec)
    ]


def evident_cells(one: Mapping[str, Any], spec: EvidenceSpec) -> list[str]:
    """What was evident on the original, what it does when it is replayed, and after a search from there."""
    replayed = evident_ones(one, "replay", spec)

    def original(trigger: Mapping[str, Any]) -> float:
        before = trigger["original"]
        return Paired(*before.get("contrast", before["lift"])).difference

    before = [f"`{probe}` {original(t):.2f} → {t['class']}" for probe, t in replayed]
    tried = [
        [f"`{probe}` {Paired(*t['lift']).difference:.2f}" for probe, t in found]
        for found in (replayed, evident_ones(one, "warm", spec))
    ]
    return [", ".join(cell) or "–" for cell in (before, *tried)]


def about(model: str, entry: Mapping[str, Any], setting: str, one: Mapping[str, Any]) -> str:
    """The first cells of a line: which repair, and what is true of it."""
    (hit, n), (wrong, of) = one["acc"], one["true_asr"]
    return (
        f"| `{model}` | {named(entry['repair'])} | {setting} | {100 * hit / n:.1f} "
        f"| {wrong}/{of} ({100 * wrong / of:.1f} %)"
    )


def furthest(one: Mapping[str, Any], mode: str) -> str:
    """`large-patch 0.62 → 1`: what lies furthest above the clean references, of all probes."""
    above = [
        (tried["excess"], tried["excess_class"], how.partition(" ")[2])
        for how, tried in one["tried"].items()
        if how.startswith(f"{mode} ") and tried.get("excess") is not None
    ]
    if not above:
        return "–"
    excess, into, probe = max(above)
    return f"`{probe}` {excess:+.2f} → {into}"


def table(stored: Mapping[str, Any], policy: Policy, name: str) -> list[str]:
    """Markdown, a line a repair and setting: what the policy's rules read."""
    modes, spec = ("replay", "warm"), policy.evidence
    evident_alone = spec is not None and any(rule.evident for rule in spec.rules)
    heads = (
        ["evident on the original", *modes]
        if evident_alone
        else [*modes, *(f"{m}, above clean" for m in modes)]
    )
    heads = ["model", "repair", "file", "accuracy", "true ASR", *heads, f"`{name}`"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model, repairs in stored["models"].items():
        for entry in repairs:
            for setting, one in entry["settings"].items():
                if "unmeasured" in one:
                    continue
                if spec is not None and evident_alone:
                    cells = evident_cells(one, spec)
                else:
                    cells = [largest(one, mode, asked(policy, mode)) for mode in modes]
                    cells += [furthest(one, mode) for mode in modes]
                says = said(entry["settings"], policy)
                lines.append(f"{about(model, entry, setting, one)} | {' | '.join(cells)} | {says} |")
    return lines


def named(repair: Mapping[str, Any]) -> str:
    """A repair in the words of a policy."""
    if "share" in repair:
        return f"{repair['share']:.2g} of the way to clean"
    fields = ", ".join(f"{key} {value}" for key, value in repair.items() if key != "kind")
    return f"`{repair['kind']}`" + (f", {fields}" if fields else "")


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--clean", type=click.Path(path_type=Path, exists=True), help="what --share moves to")
@click.option("--share", "shares", multiple=True, type=float, help="of the way to --clean")
@click.option("--left", "lefts", multiple=True, type=float, help="as far to --clean as leaves this ASR")
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
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path))
@click.option("--preset", default="fast", show_default=True)
@click.option("--samples", default=500, show_default=True, help="holdout samples that score a trigger")
@click.option(
    "--policy", "judging", default=BLIND, type=click.Path(path_type=Path, exists=True), help="for --table"
)
@click.option("--table", "only_table", is_flag=True, help="print what is stored, search nothing")
def main(**o: Any) -> None:
    """Search every one of MODELS once, then try what was found on repaired versions of it.

    A repair that is stored already is not made again.
    """
    stored = json.loads(o["out"].read_text()) if o["out"].is_file() else {"models": {}}
    if o["only_table"]:
        click.echo("\n".join(table(stored, load_policy(o["judging"]), o["judging"].name)))
        return
    if (o["shares"] or o["lefts"]) and o["clean"] is None:
        raise click.UsageError("--share and --left are ways to a clean network: give --clean")
    torch.set_num_threads(1)
    spec = EvidenceSpec.model_validate(
        {"preset": o["preset"], "samples": o["samples"], "rules": tuple(LIMITS)}
    )
    data = datasets.cifar10(o["cache"])
    names = o["settings"].split(",")
    settings = [Setting(name, SETTINGS[name], {"kind": "onnx"}, False) for name in names]
    wanted: list[dict[str, Any]] = [{"share": s} for s in o["shares"]] + [{"left": a} for a in o["lefts"]]
    wanted += [json.loads(recipe) for recipe in o["recipes"]]
    clean_ones = [(path, load(path, cards.read(path.with_suffix(".json")))) for path in o["references"]]
    for path in o["models"]:
        card = cards.read(path.with_suffix(".json"))
        rows = stored["models"].setdefault(path.stem, [])
        repairs = [one for one in wanted if not any(one.items() <= row["repair"].items() for row in rows)]
        bench = bench_of(card, data, o["folder"] / f"{path.parent.name}-{path.stem}", o["samples"])
        work, model = work_of(spec, len(card["classes"]), bench), load(path, card)
        original = at_the_head(model, HEAD, "original", digests.of_file(path), bench)
        searches = cold_searches(through_settings(original, settings, bench), work) if repairs else []
        known = {kind: best_known(searches, probe, work) for kind, probe in work.probes.items()}
        compared = [
            tried_again(through_settings(lined, settings, bench), known, work)
            for path, network in (clean_ones if repairs else ())
            for lined in [at_the_head(network, HEAD, "original", digests.of_file(path), bench)]
        ]
        clean = load(o["clean"], cards.read(o["clean"].with_suffix(".json"))) if o["clean"] else None
        for repair, network in repaired(model, card["target_class"], clean, repairs, bench):
            identity = digests.of_state(network.state_dict())
            lined = at_the_head(network, HEAD, "purified", identity, bench, original.reference)
            results = through_settings(lined, settings, bench)
            tried = tried_again(results, known, work)
            if compared:
                tried = calibrated(tried, compared)
            target = card["target_class"]
            made = {result.setting: row(result, tried, searches, target) for result in results}
            told = {"sha256": card["sha256"], "target_class": card["target_class"]}
            rows.append({"repair": repair} | told | {"settings": made})
            click.echo(f"{path.stem} {json.dumps(rows[-1])}", err=True)
            about = {"preset": o["preset"], "samples": o["samples"], "seed": 0, "versions": dict(versions())}
            o["out"].write_text(json.dumps(stored | about, indent=1) + "\n")


if __name__ == "__main__":
    main()
