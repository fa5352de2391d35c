"""What every locator says of models whose truth is known, and of their compressed files.

    python -m benchmarks.locate_trials build/zoo/*.json build/clean/*/*.json
    python -m benchmarks.locate_table

The same road as `secure-export run`: the policy's files, its locators with its parameters, 500 fit samples of
the training split. Whether the backdoor is awake in a file is counted with the card's trigger on test samples
that no locator sees. Rows are added to the results; a model whose weights are there already is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cards, datasets, sources, stored
from benchmarks.benches import bench_of, stratified
from secure_export import defence, digests, heads, loading, registry
from secure_export.environment import versions
from secure_export.lane import Bench, Lined, at_the_head, through_settings
from secure_export.policy import Locate, Policy, Setting, load_policy
from secure_export.records.measured import SettingResult, Suspect
from secure_export.records.memory import Subject

RESULT = Path(__file__).parent / "results" / "locate.json"
SETTINGS = "fp32,int8,int8-per-tensor,prune@0.5,prune-mask@0.3"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--policy", "policy_path", default="policies/strict.yaml", type=click.Path(path_type=Path))
@click.option("--settings", default=SETTINGS, show_default=True, help="of the policy")
@click.option("--only", multiple=True, help="locators; default: all of them")
@click.option("--test", default=2000, show_default=True, help="test samples that say what is awake")
@click.option("--cache", default="build/data", type=click.Path(path_type=Path))
@click.option("--folder", default="build/locate", type=click.Path(path_type=Path))
@click.option("--out", default=RESULT, type=click.Path(path_type=Path))
def main(
    models: tuple[Path, ...],
    policy_path: Path,
    settings: str,
    only: tuple[str, ...],
    test: int,
    cache: Path,
    folder: Path,
    out: Path,
) -> None:
    """Run every locator on the models whose cards are MODELS, and on their files."""
    torch.set_num_threads(1)
    policy = load_policy(policy_path)
    locate = every_locator(policy, only)
    chosen = [s for s in policy.expanded_settings() if s.name in settings.split(",")]
    loaded: dict[str, datasets.Images] = {}
    for path in models:
        card = cards.read(path)
        name = f"{path.parent.name}/{path.stem}"
        asked = {"sha256": card["sha256"], "settings": [s.name for s in chosen], "test": test}
        asked["locators"] = list(locate.methods)
        known = stored.read(out)["models"].get(name, {})
        if covers(known, asked):
            continue
        dataset = card.get("dataset", "cifar10")
        if dataset not in loaded:
            loaded[dataset] = sources.named(dataset, cache, None)
        began = time.monotonic()
        rows = located(path, card, loaded[dataset], locate, chosen, folder / name.replace("/", "-"), test)
        kept = {key: card[key] for key in ("attack", "target_class", "architecture", "seed")}
        seconds = round(time.monotonic() - began, 1)
        with stored.changed(out) as found:
            found["models"][name] = asked | kept | {"dataset": dataset, "rows": rows, "seconds": seconds}
            found |= {
                "policy": policy_path.name,
                "policy_sha256": policy.sha256,
                "versions": dict(versions()),
            }
        click.echo(f"{name} ({seconds:.0f} s)", err=True)


def covers(known: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether the stored trial `known` answers all that is asked, and perhaps more."""
    return all(
        all(part in known.get(key, ()) for part in value)
        if isinstance(value, list)
        else known.get(key) == value
        for key, value in asked.items()
    )


def every_locator(policy: Policy, only: Sequence[str] = ()) -> Locate:
    """The policy's locators with its parameters, and all others with their defaults; or those of `only`."""
    named = {method["kind"] for method in policy.locate.methods}
    others = tuple({"kind": kind} for kind in registry.names("locators") if kind not in named)
    methods = tuple(m for m in (*policy.locate.methods, *others) if not only or m["kind"] in only)
    return policy.locate.model_copy(update={"methods": methods})


def located(
    path: Path,
    card: dict[str, Any],
    data: datasets.Images,
    locate: Locate,
    settings: Sequence[Setting],
    folder: Path,
    test: int,
) -> dict[str, Any]:
    """By setting: accuracy and success of the card's trigger as counts, and the answer of every locator."""
    bench, subject, lined = opened(path, card, data, folder, test)
    originals = through_settings(lined, settings, bench)
    suspects = defence.locate(locate, subject, originals, bench, settings)
    rows = {result.setting: truth(result, card["target_class"]) for result in originals}
    rows["subject"] = dict(rows.get("fp32", {}))
    for suspect in suspects:
        rows[suspect.setting].setdefault("locators", {})[suspect.locator] = answer(suspect)
    return rows


def opened(
    path: Path, card: dict[str, Any], data: datasets.Images, folder: Path, test: int
) -> tuple[Bench, Subject, Lined]:
    """A model whose card is known at the head of its lane: 500 samples each of fit and calibration."""
    bench = bench_of(card, data, folder, test)
    _, calibration = stratified(data.train_x, data.train_y, 500, 0)
    calibration = replace(calibration, sha256=digests.of_arrays(calibration.inputs.numpy()))
    bench = replace(bench, splits=replace(bench.splits, calibration=calibration))
    subject = subject_of(path, card, data)
    return bench, subject, at_the_head(subject.model, subject.head, "original", subject.identity, bench)


def subject_of(path: Path, card: dict[str, Any], data: datasets.Images) -> Subject:
    """The model that a card describes, behind its normalization."""
    model = cards.network(card, path.with_suffix(".safetensors"))
    shape = tuple(data.train_x.shape[1:])
    head, classes = heads.find(model, shape)
    made = (card["sha256"], card["architecture"], loading.answers(model, shape))
    return Subject(model, shape, classes, head, *made, path)


def truth(result: SettingResult, target_class: int) -> dict[str, Any]:
    """What one file does on the test samples; ASR and FTR of the card's trigger and target."""
    measured = result.measurement
    if measured is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else "no file"}
    row: dict[str, Any] = {"acc": [measured.acc.hits, measured.acc.total]}
    for counts in measured.triggers:
        asr, lift = counts.asr[target_class], counts.lift[target_class]
        row |= {
            "asr": [asr.hits, asr.total],
            "ftr": [asr.hits - lift.gained + lift.lost, lift.total],
        }
    return row


def answer(suspect: Suspect) -> dict[str, Any]:
    """What one locator says of one file, as JSON."""
    return {
        "class": suspect.target_class,
        "scores": [round(score, 4) for score in suspect.scores],
        "evidence": dict(suspect.evidence),
    }


if __name__ == "__main__":
    main()
