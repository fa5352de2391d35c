"""What a policy's rules on replay and warm search make of the repaired models of benchmarks.evidence_replay.

python -m benchmarks.evidence_replay_table RESULTS --policy POLICY
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.evidence_replay import RESULTS
from secure_export.policy import EvidenceSpec, Policy, Setting, load_policy
from secure_export.policy._readings import Reading, decide
from secure_export.records.measured import Paired

BLIND = Path(__file__).parents[1] / "policies" / "blind.yaml"


def evident(trigger: Mapping[str, Any], probe: str, policy: Policy) -> bool:
    """Whether a trigger may break a rule of the policy on the original file, or it is not stored."""
    original, spec = trigger.get("original"), policy.evidence
    if original is None or spec is None:
        return True
    counted = {reading: Paired(*counts) for reading, counts in original.items()}
    setting = Setting(trigger["origin"], (), {"kind": "onnx"}, True)
    return not spec.held(setting, probe, counted, 1 - policy.confidence)


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
        # No stored replay is of triggers for pairs of classes.
        probes = [probe for probe in spec.read_by(rule) if probe not in spec.paired]
        if not probes:
            continue
        for one in settings.values():
            tried = [one.get("tried", {}).get(f"{rule.mode} {probe}", {}) for probe in probes]
            if rule.reading == "excess":
                readings = [Reading("", t["excess"], 1) for t in tried if t.get("excess") is not None]
                outcomes += [None] * (len(tried) - len(readings))
            else:
                found = {probe: t.get("found") or () for probe, t in zip(probes, tried, strict=True)}
                triggers = [(t, probe) for probe, some in found.items() for t in some]
                read = [t for t, probe in triggers if not rule.evident or evident(t, probe, policy)]
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


def evident_ones(
    one: Mapping[str, Any], mode: str, policy: Policy, spec: EvidenceSpec
) -> list[tuple[str, Any]]:
    """(probe, trigger) of what did not hold a rule on the original and was tried again in this mode."""
    read = dict.fromkeys(
        probe for rule in spec.rules if rule.evident and rule.mode == mode for probe in spec.read_by(rule)
    )
    tried = [(probe, one["tried"].get(f"{mode} {probe}", {}).get("found", ())) for probe in read]
    return [
        (probe.removeprefix("contrast-"), trigger)
        for probe, found in tried
        for trigger in found
        if evident(trigger, probe, policy)
    ]


def evident_cells(one: Mapping[str, Any], policy: Policy, spec: EvidenceSpec) -> list[str]:
    """What was evident on the original, what it does when it is replayed, and after a search from there."""
    replayed = evident_ones(one, "replay", policy, spec)

    def original(trigger: Mapping[str, Any]) -> float:
        before = trigger["original"]
        return Paired(*before.get("contrast", before["lift"])).difference

    before = [f"`{probe}` {original(t):.2f} → {t['class']}" for probe, t in replayed]
    tried = [
        [f"`{probe}` {Paired(*t['lift']).difference:.2f}" for probe, t in found]
        for found in (replayed, evident_ones(one, "warm", policy, spec))
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
                    cells = evident_cells(one, policy, spec)
                else:
                    cells = [largest(one, mode, asked(policy, mode)) for mode in modes]
                    cells += [furthest(one, mode) for mode in modes]
                says = said(entry["settings"], policy)
                lines.append(f"{about(model, entry, setting, one)} | {' | '.join(cells)} | {says} |")
    return lines


def named(repair: Mapping[str, Any]) -> str:
    """A repair in the words of a policy."""
    if "share" in repair:
        goal = f"`{repair['toward']}`" if "toward" in repair else "clean"
        return f"{repair['share']:.2g} of the way to {goal}"
    fields = ", ".join(f"{key} {value}" for key, value in repair.items() if key != "kind")
    return f"`{repair['kind']}`" + (f", {fields}" if fields else "")


@click.command()
@click.argument("results", default=RESULTS, type=click.Path(path_type=Path, exists=True))
@click.option("--policy", default=BLIND, type=click.Path(path_type=Path, exists=True), help="whose rules")
def main(results: Path, policy: Path) -> None:
    """Print RESULTS as a table, with what the rules of a policy say of each repair."""
    click.echo("\n".join(table(json.loads(results.read_text()), load_policy(policy), policy.name)))


if __name__ == "__main__":
    main()
