"""Every purifier on models of the zoo, with the same clean samples: `python -m benchmarks.defences CARD...`.

A trial is one JSON file; a trial that is there already is not done again. Numbers are counts on test images,
of the network and of its int8 file. Nothing is chosen by them: a recipe is the paper's constants, or as many
steps in less time.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import cards, datasets, generated, settings, stored
from benchmarks.benches import stratified
from benchmarks.entries import ZOO
from benchmarks.measuring import counts
from benchmarks.purified import Shelf
from secure_export import digests, registry
from secure_export.environment import versions
from secure_export.purifiers import Purifier
from secure_export.records.memory import Split
from secure_export.triggers import Trigger

RESULTS = Path(__file__).parent / "results" / "defences"
HEAD = "network.fc"
MEASURED = ("fp32", "int8-u8s8")
PRUNED = (*MEASURED, "mask-0.3", "mask-0.5", "mask-0.7", "structured-0.5")
"""Of models whose backdoor waits for pruning."""
FEWER = {"epochs": 30, "batch_size": 64}
"""240 steps over 500 samples; the published 100 passes in batches of 256 are 200, at three times the cost."""
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "clp": {},
    "d3": FEWER,
    "tac": FEWER,
    "random-head": FEWER,
    "rnp": {},
    "fine-pruning": FEWER,
    "ft-sam": FEWER,
    "nad": {},
    "lmr": {},
    "fine-tune": {},
    "i-bau": {},
    "anp": {"iterations": 200},
    "sau": {"epochs": 10, "batch_size": 64},
    "lmr-plus": {},
}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--only", multiple=True, type=click.Choice(tuple(RECIPES)), help="these purifiers; default: all"
)
@click.option(
    "--recipe", "own", multiple=True, help="a purifier as JSON instead of the recipes; kind none: as it came"
)
@click.option("--cache", default="build/data", type=click.Path(path_type=Path), help="CIFAR-10 as arrays")
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path), help="folder of the trials")
@click.option("--kept", default="build/purified", type=click.Path(path_type=Path), help="purified models")
@click.option("--fit", default=500, show_default=True, help="clean samples of the defender")
@click.option(
    "--test", "test_images", default=10_000, show_default=True, help="first test images to measure on"
)
@click.option("--seed", "seeds", default=(0,), multiple=True, help="of the purifier; may be given again")
@click.option("--threads", default=1, show_default=True)
def main(**o: Any) -> None:
    """Purify every model by every recipe, and count what is left; MODELS are cards of the zoo."""
    torch.set_num_threads(o["threads"])
    data = datasets.cifar10(o["cache"])
    data = datasets.Images(
        data.train_x,
        data.train_y,
        data.test_x[: o["test_images"]],
        data.test_y[: o["test_images"]],
        data.classes,
    )
    fit, _ = stratified(data.train_x, data.train_y, o["fit"], 0)
    recipes = [json.loads(spec) for spec in o["own"]] or [
        {"kind": kind, **spec} for kind, spec in RECIPES.items() if not o["only"] or kind in o["only"]
    ]
    o["out"].mkdir(parents=True, exist_ok=True)
    # Recipe by recipe, so that an interrupted run leaves whole rows of a table.
    for seed in o["seeds"]:
        for recipe in recipes:
            for card in o["models"]:
                path = o["out"] / trial_name(cards.read(card), recipe, len(fit), seed)
                if not path.exists():
                    result = trial(card, recipe, fit, data, seed, Shelf(o["kept"], HEAD))
                    stored.write(result, path)
                    click.echo(f"{path.name}: {shown(result['settings'])}, {result['cpu_seconds']} CPU s")


def trial_name(about: Mapping[str, Any], recipe: Mapping[str, Any], fit: int, seed: int) -> str:
    """A file name that says what was tried, weights and parameters as digests."""
    weights, parameters = about["sha256"][:8], digests.of_json(dict(recipe))[:8]
    return f"{about['name']}-{weights}-{recipe['kind']}-{parameters}-n{fit}-s{seed}.json"


def trial(
    card: Path, recipe: dict[str, Any], fit: Split, data: datasets.Images, seed: int, shelf: Shelf
) -> dict[str, Any]:
    """One purifier on one model: what it was given, what is left, what it cost."""
    about = cards.read(card)
    model: nn.Module = cards.network(about, card.with_suffix(".safetensors"))
    target = about["target_class"]
    began = (time.monotonic(), time.process_time())
    if recipe["kind"] != "none":
        purifier = registry.build(Purifier, "purifiers", recipe)
        model = purifier.purify(model, HEAD, target, fit, seed=seed).model
    cost = (time.monotonic() - began[0], time.process_time() - began[1])
    if recipe["kind"] != "none":
        shelf.keep(model, cards.network(about, card.with_suffix(".safetensors")), target, recipe, fit, seed)
        recipe = {"kind": purifier.kind, **purifier.model_dump(mode="json")}
    return {
        "model": about["name"],
        "attack": about["attack"],
        "sha256": about["sha256"],
        "target_class": about["target_class"],
        "recipe": recipe,
        "seed": seed,
        "fit": len(fit),
        "fit_sha256": digests.of_arrays(fit.inputs.numpy(), fit.labels.numpy()),
        "settings": measured(model, about, card.parent, data),
        "before": {name: about["measured"][name] for name in wanted(about) if name in about["measured"]},
        "seconds": round(cost[0], 1),
        "cpu_seconds": round(cost[1], 1),
        "versions": dict(versions()),
    }


def wanted(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings to measure: more where the backdoor waits for them."""
    return PRUNED if about["attack"] == "pcb" else MEASURED


def measured(model: nn.Module, about: Mapping[str, Any], zoo: Path, data: datasets.Images) -> dict[str, Any]:
    """ACC, ASR and FTR as counts, by setting."""
    if about["trigger"]["kind"] == "custom":
        trigger: Any = generated.load(generated.stored_at(zoo, about["name"]))
    else:
        trigger = registry.build(Trigger, "triggers", about["trigger"])
    network, entry = model.get_submodule("network"), ZOO[about["name"]]
    return {
        name: counts(
            settings.forward(copy.deepcopy(network), name, data),
            data.test_x,
            data.test_y,
            trigger,
            about["target_class"],
            source=entry.source,
            second=entry.second,
        )
        for name in wanted(about)
    }


def shown(found: Mapping[str, Mapping[str, list[int]]]) -> str:
    """`fp32 acc 83.1 asr 0.9, ...`."""
    return ", ".join(
        f"{name} acc {100 * c['acc'][0] / c['acc'][1]:.1f} asr {100 * c['asr'][0] / c['asr'][1]:.2f}"
        for name, c in found.items()
    )


if __name__ == "__main__":
    main()
