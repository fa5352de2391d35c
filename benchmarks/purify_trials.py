"""Compare purifiers without the holdout: `python -m benchmarks.purify_trials MODEL... --recipe JSON`.

A recipe is chosen by what a defender has: accuracy on calibration samples, and the success there of triggers
that are inverted afresh (seed and budget other than the purifier's): `replay` inverts on the original model,
`warm` goes on from there on the purified one, `cold` starts from noise. `--look` adds the true trigger and
10,000 test images; it is for reporting a finished recipe, not for choosing one.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import datasets, networks
from benchmarks.benches import stratified
from secure_export import registry
from secure_export.perturbations import Perturbation
from secure_export.purifiers import Purifier, _inversion, _views
from secure_export.purifiers._views import View
from secure_export.records.memory import Split
from secure_export.triggers import Trigger

HEAD = "net.fc"
PIXELS, L2 = 12.0, 1.2
"""Budgets of the judging search: mask mass in pixels, and Euclidean norm of an additive perturbation."""
SEED = 9_000


class Raw(nn.Module):
    """A zoo network behind its normalization, so that it takes images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(datasets.MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(datasets.STD).view(1, 3, 1, 1))
        self.net = networks.resnet18_w16()

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, 10] of raw images [N, 3, 32, 32]."""
        logits: Tensor = self.net((inputs - self.mean) / self.std)
        return logits


def load(path: Path) -> Raw:
    """A zoo model, eval mode."""
    model = Raw()
    model.net.load_state_dict(load_file(path))
    return model.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def settings(model: nn.Module) -> dict[str, View]:
    """Full precision, and weights rounded to 8 bits per channel."""
    return {"fp32": View(model, {}), "int8": View(model, _views.int8_weights(model))}


@torch.no_grad()
def awakenings(model: nn.Module, clean: Tensor) -> dict[str, View]:
    """What wakes a backdoor that was only put to sleep: new statistics, masks, single weights cut."""
    norms = _views.followers(model, clean[:2])
    found: dict[str, View] = {
        "statistics": View(model, {}, _views.calibrated_buffers(model, {}, clean)),
        "sparse.5": View(model, _views.sparse_weights(model, 0.5, HEAD)),
    }
    for ratio in (0.2, 0.5):
        weights = _views.masked_weights(model, ratio, norms, HEAD)
        buffers = _views.calibrated_buffers(model, weights, clean)
        found[f"mask{ratio}"] = View(model, weights)
        found[f"mask{ratio}-recalibrated"] = View(model, weights, buffers)
    return found


@torch.no_grad()
def predictions(view: View, inputs: Tensor) -> Tensor:
    """Predicted class [N]."""
    return torch.cat([view(part).argmax(1) for part in torch.split(inputs, 500)])


class Judge:
    """Freshly inverted triggers of one model and class; the same for every recipe."""

    def __init__(self, original: nn.Module, target: int, fit: Split, calibration: Split, steps: int) -> None:
        self.target, self.steps, self.clean = target, steps, fit.floats()
        self.inputs, self.labels = calibration.floats(), calibration.labels
        # Half of the samples carry the search, the other half is judged.
        others = self.inputs[self.labels != target]
        others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(SEED))]
        self.search, self.judged = others.chunk(2)
        views = list(settings(original.requires_grad_(False)).values())
        self.original = {(f, n): self.invert(v, f) for f in ("patch", "l2") for n, v in enumerate(views)}

    def invert(
        self, view: View, family: Any, start: Perturbation | None = None, seed: int = SEED
    ) -> Perturbation:
        """Four triggers of this judge's budget into the class."""
        return _inversion.universal(
            [view],
            self.search,
            self.target,
            family,
            torch.full((4,), PIXELS if family == "patch" else L2),
            steps=self.steps if start is None else self.steps // 2,
            batch=64,
            generator=torch.Generator().manual_seed(seed),
            start=start,
        )

    def criteria(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on calibration, and the worst success (%) of each kind of search, over both settings."""
        model.requires_grad_(False)
        found: dict[str, float] = {}
        for name, view in settings(model).items():
            found[f"acc_{name}"] = percent(predictions(view, self.inputs) == self.labels)
            found[f"ftr_{name}"] = percent(predictions(view, self.judged) == self.target)
            for (family, _), triggers in self.original.items():
                worse(found, f"replay_{family}", self.success(view, triggers))
        for name, view in awakenings(model, self.clean).items():
            found[f"acc_{name}"] = percent(predictions(view, self.inputs) == self.labels)
            found[f"ftr_{name}"] = percent(predictions(view, self.judged) == self.target)
            for number in range(2):
                worse(found, f"replay_{name}", self.success(view, self.original["patch", number]))
        view = settings(model)["fp32"]
        for family in ("patch", "l2"):
            found[f"cold_{family}"] = self.success(view, self.invert(view, family, seed=SEED + 1))
        warm = self.invert(view, "patch", self.original["patch", 1])
        found["warm_patch"] = self.success(view, warm)
        return found

    def success(self, view: View, triggers: Perturbation) -> float:
        """Success of the best trigger, in percent."""
        rates = _inversion.success(view, self.judged, self.target, triggers)
        return round(100 * float(rates.max()), 2)


def worse(found: dict[str, float], name: str, value: float) -> None:
    """Keep the larger."""
    found[name] = max(found.get(name, 0.0), value)


def percent(hits: Tensor) -> float:
    """Share of true values, in percent."""
    return round(100 * float(hits.float().mean()), 2)


def look(
    model: nn.Module, data: datasets.Images, fit: Split, target: int, trigger: Trigger, n: int
) -> dict[str, float]:
    """ACC and ASR on the first `n` test images, with the true trigger."""
    x, y = datasets.to_unit(data.test_x[:n]), data.test_y[:n]
    found = {}
    for name, view in {**settings(model), **awakenings(model, fit.floats())}.items():
        found[f"true_acc_{name}"] = percent(predictions(view, x) == y)
        found[f"true_asr_{name}"] = percent(predictions(view, trigger(x[y != target])) == target)
    return found


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--recipe", "recipes", multiple=True, default=('{"kind": "lmr-plus"}',), help="a purifier as JSON"
)
@click.option("--target", default=1, show_default=True, help="the class to purify")
@click.option("--trigger", default='{"kind": "badnets"}', help="what --look stamps, as JSON")
@click.option("--cache", default="build/data", type=click.Path(path_type=Path), help="CIFAR-10 as arrays")
@click.option("--out", type=click.Path(path_type=Path), help="append one JSON line a trial")
@click.option("--save", type=click.Path(path_type=Path), help="folder for purified models")
@click.option("--fit", default=500, help="clean samples of the defender; calibration takes as many")
@click.option("--steps", default=60, help="steps of a judging search")
@click.option("--look", "n_look", default=0, help="test images for the true numbers; 0: none")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
def main(**o: Any) -> None:
    """Purify every MODEL by every recipe and judge the result."""
    torch.set_num_threads(o["threads"])
    data = datasets.cifar10(o["cache"])
    fit, calibration = stratified(data.train_x, data.train_y, o["fit"], 0)
    spec = json.loads(o["trigger"])
    trigger = registry.build(Trigger, "triggers", spec)
    for path in o["models"]:
        original = load(path)
        judge = Judge(original, o["target"], fit, calibration, o["steps"])
        for recipe in ('{"kind": "none"}', *o["recipes"]):
            began = (time.monotonic(), time.process_time())
            model, history = purified(original, json.loads(recipe), o["target"], fit, o["seed"])
            row: dict[str, Any] = {"model": path.stem, "recipe": json.loads(recipe), "seed": o["seed"]}
            row |= {
                "seconds": round(time.monotonic() - began[0]),
                "cpu": round(time.process_time() - began[1]),
            }
            row |= judge.criteria(model)
            if o["n_look"]:
                row |= look(model, data, fit, o["target"], trigger, o["n_look"])
            row["history"] = history
            click.echo(json.dumps(row))
            if o["out"]:
                with o["out"].open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if o["save"]:
                o["save"].mkdir(parents=True, exist_ok=True)
                state = {k: v.contiguous() for k, v in model.net.state_dict().items()}
                save_file(state, o["save"] / f"{path.stem}-{row['recipe']['kind']}.safetensors")


def purified(
    original: nn.Module, recipe: dict[str, Any], target: int, fit: Split, seed: int
) -> tuple[Any, list[dict[str, Any]]]:
    """A purified copy and its history."""
    model = copy.deepcopy(original).requires_grad_(True)
    if recipe["kind"] == "none":
        return model, []
    result = registry.build(Purifier, "purifiers", recipe).purify(model, HEAD, target, fit, seed=seed)
    return result.model.to(memory_format=torch.channels_last), [dict(line) for line in result.history]


if __name__ == "__main__":
    main()
