"""What is found of zoo models without their trigger: `python -m benchmarks.evidence MODEL...`.

Every model (weights beside a card) goes through every setting; the file is searched for a trigger, and its
true ASR with the trigger of the card is measured for comparison only. Which models set thresholds and which
are held out stands in benchmarks/evidence_models.yaml, written before the first run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cards, datasets, sources, stored
from benchmarks.benches import bench_of
from benchmarks.entries import ZOO
from secure_export import digests, heads
from secure_export.environment import versions
from secure_export.errors import CompressError
from secure_export.evidence import cold_searches, work_of
from secure_export.evidence.files import opened
from secure_export.evidence.rounding import reading
from secure_export.lane import Bench, Lined, at_the_head, through_settings, unrounded
from secure_export.policy import EvidenceSpec, Setting
from secure_export.records.measured import Measurement, Paired, SettingResult, TriggerCounts
from secure_export.records.searches import FoundTrigger, Rounding, Search
from secure_export.report._evidence import best_of

SETTINGS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "fp32": (),
    "int8": ({"kind": "ort-static-int8"},),
    "int8-per-tensor": ({"kind": "ort-static-int8", "per_channel": False},),
    "int8-stochastic": ({"kind": "stochastic-rounding", "seed": 20240611}, {"kind": "ort-static-int8"}),
    "int8-flipped": ({"kind": "flipped-rounding"}, {"kind": "ort-static-int8"}),
    "prune-mask-0.3": ({"kind": "prune-channel-mask", "ratio": 0.3},),
    "prune-mask-0.5": ({"kind": "prune-channel-mask", "ratio": 0.5},),
    "prune-structured-0.3": ({"kind": "prune-structured", "ratio": 0.3},),
    "prune-structured-0.5": ({"kind": "prune-structured", "ratio": 0.5},),
}
LIMITS = [{"metric": "inverted_lift", "at_most": 0.5}]


def one(
    path: Path,
    names: Sequence[str],
    spec: EvidenceSpec,
    data: datasets.Images,
    folder: Path,
    n: int,
    search: bool,
) -> Any:
    """Searches, rounding and truth of one model, by setting."""
    card = cards.read(path.with_suffix(".json"))
    bench = bench_of(card, data, folder, n)
    model = cards.network(card, path)
    head, _ = heads.find(model, tuple(data.test_x.shape[1:]))
    lined = at_the_head(model, head, "original", digests.of_file(path), bench)
    settings = [Setting(name, SETTINGS[name], {"kind": "onnx"}, False) for name in names]
    rows = {}
    for setting, result in zip(settings, through_settings(lined, settings, bench), strict=True):
        searches = cold_searches([result], work_of(spec, len(card["classes"]), bench)) if search else []
        rows[setting.name] = row(card, result, searches, rounding(lined, setting, result, bench))
        rows[setting.name]["asr_pass_seconds"] = asr_pass(result, data, bench)
        click.echo(f"{path.stem} {setting.name} {summary(rows[setting.name])}", err=True)
    return {
        "card": card["name"],
        "attack": card["attack"],
        "target_class": card["target_class"],
        "rows": rows,
    }


def asr_pass(result: SettingResult, data: datasets.Images, bench: Bench) -> float | None:
    """Seconds that the file takes for all triggered test images once: the yardstick of a search's cost."""
    file = opened(result, bench.splits.fit, bench.runtime)
    if isinstance(file, str) or not bench.triggers:
        return None
    (trigger,) = bench.triggers.values()
    started = time.perf_counter()
    for part in torch.split(data.test_x, 500):
        file.predictor(trigger(datasets.to_unit(part)))
    return round(time.perf_counter() - started, 2)


def rounding(lined: Lined, setting: Setting, result: SettingResult, bench: Bench) -> Rounding | None:
    """The traces in a quantized file; None for others, and where the weights lie too far apart."""
    source = unrounded(lined, setting, bench)
    if source is None or result.artifact is None:
        return None
    try:
        return reading("original", setting.name, source, result.artifact.path, bench.splits.fit, seed=0)
    except CompressError as error:
        click.echo(error.message, err=True)
        return None


def row(card: Any, result: SettingResult, searches: Sequence[Search], traces: Rounding | None) -> Any:
    """One (model, setting): the truth as counts, and what each probe found."""
    measured, target = result.measurement, card["target_class"]
    if measured is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else ""}
    truth: dict[str, Any] = {"acc": [measured.acc.hits, measured.acc.total]}
    for counts in measured.triggers:
        asr, lift = counts.asr[target], lift_of(measured, counts, card)
        truth |= {"asr": [asr.hits, asr.total], "lift": [lift.gained, lift.lost, lift.total]}
    probes: dict[str, Any] = {}
    for search in searches:
        best = best_of(search)
        probes[search.probe] = {
            "class": best.target_class if best else None,
            "lift": best.lift.difference if best and best.lift else None,
            "contrast": best.contrast.difference if best and best.contrast else None,
            **({"source": best.source_class} if best and best.source_class is not None else {}),
            "fit_lift": {by_aim(found): round(found.on_fit, 4) for found in search.found},
            "seconds": search.seconds,
            "forwards": search.forwards,
            "unsearched": search.unsearched,
        }
    return {"truth": truth, "probes": probes, "rounding": asdict(traces) if traces else None}


def lift_of(measured: Measurement, counts: TriggerCounts, card: Any) -> Paired:
    """Of the planted trigger: on all other classes, or on the one that the attack is made for."""
    entry, target = ZOO.get(card["name"]), card["target_class"]
    if entry is None or entry.source is None:
        of_all: Paired = counts.lift[target]
        return of_all
    total = (measured.of_class or ())[entry.source]
    pairs = [one.lift for one in counts.pairs or () if (one.source, one.into) == (entry.source, target)]
    return pairs[0] if pairs else Paired(0, 0, total)


def by_aim(found: FoundTrigger) -> int | str:
    """Its class, or "source > class"."""
    source, target = found.source_class, found.target_class
    return target if source is None else f"{source} > {target}"


def summary(found: Any) -> str:
    """One line."""
    if "unmeasured" in found:
        return f"unmeasured: {found['unmeasured']}"
    parts = [f"true {found['truth'].get('asr')}"]
    for probe, values in found["probes"].items():
        lift = "none" if values["lift"] is None else f"{values['lift']:.3f} into {values['class']}"
        if "source" in values:
            lift += f" from {values['source']}"
        if values["contrast"] is not None:
            lift += f", contrast {values['contrast']:.3f}"
        parts.append(f"{probe} {lift} ({values['seconds']:.0f} s){values['unsearched']}")
    if traces := found["rounding"]:
        parts += [f"{name} {traces[name]:.2f}" for name in ("ks", "edge", "z") if traces[name] is not None]
        parts.append(f"extrapolation {traces['top_shares']} {traces['target_class']}")
    return "; ".join(parts)


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--dataset", default="cifar10", type=click.Choice(sources.NAMES))
@click.option("--folder", default="build/evidence", type=click.Path(path_type=Path))
@click.option("--out", default="benchmarks/results/evidence-zoo.json", type=click.Path(path_type=Path))
@click.option("--settings", default="fp32,int8", show_default=True)
@click.option("--preset", default="fast", show_default=True)
@click.option("--probe", "probes", multiple=True, help="JSON, instead of the preset's")
@click.option("--noise", type=float, help="of references made on the spot, if not the default")
@click.option("--samples", default=500, show_default=True, help="holdout samples that score a trigger")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--search/--no-search", default=True, help="truth and rounding alone take seconds")
def main(
    models: tuple[Path, ...],
    cache: Path,
    dataset: str,
    folder: Path,
    out: Path,
    settings: str,
    preset: str,
    probes: tuple[str, ...],
    noise: float | None,
    samples: int,
    threads: int,
    search: bool,
) -> None:
    """Search every model under every setting and add the rows to the results."""
    torch.set_num_threads(threads)
    own = tuple(json.loads(probe) for probe in probes)
    section = {
        "preset": None if own else preset,
        "probes": own,
        "samples": samples,
        "rules": tuple(LIMITS),
    }
    spec = EvidenceSpec.model_validate(section | ({"forget": {"noise": noise}} if noise else {}))
    data = sources.named(dataset, cache, None)
    for path in models:
        started = time.perf_counter()
        names = settings.split(",")
        place = folder / f"{path.parent.name}-{path.stem}"
        rows = one(path, names, spec, data, place, samples, search)
        with stored.changed(out) as found:
            known = found["models"].setdefault(f"{path.parent.name}/{path.stem}", rows)
            for name, made in rows["rows"].items():
                # Truth and rounding are quick to measure again; a search stays until it is repeated.
                searched = known["rows"].get(name, {}).get("probes") or {}
                known["rows"][name] = made | {"probes": made.get("probes") or searched}
            known["seconds"] = round(time.perf_counter() - started, 1)
            found |= {
                "preset": "own" if own else preset,
                "probes": spec.specs,
                "forget": spec.forget.model_dump(),
                "samples": samples,
                "seed": 0,
                "versions": dict(versions()),
            }


if __name__ == "__main__":
    main()
