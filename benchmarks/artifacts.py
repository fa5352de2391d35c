"""Every format that ships, on one model: which toolchain makes it, and what its file does, counted.

    python -m benchmarks.artifacts qcb clean --zoo build/zoo
    python -m benchmarks.artifacts --support resnet18 --support mobilenetv2 --support vit_small

`--support` networks have fresh weights: they show what a toolchain can make and how near the file is
to eager, and nothing of accuracy. Extras that are not installed appear as unmeasured, with the reason,
unless another environment has stored the row already (LiteRT needs a torch of its own). `--missing` goes
on where another call was stopped. `artifacts_table` draws what is stored.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import cards, datasets, networks, stored
from secure_export import architectures, digests, heads, registry
from secure_export.compressors import Context
from secure_export.compressors._layers import recalibrate_batchnorm
from secure_export.compressors.fake_quant import FakeQuant
from secure_export.environment import versions
from secure_export.lane import Bench, Lined, at_the_head, through_settings
from secure_export.ledger import Ledger, user_key
from secure_export.loading import Normalized
from secure_export.measure import measure
from secure_export.policy.schema import Setting
from secure_export.records.measured import Measurement, SettingResult
from secure_export.records.memory import Split, Splits, silent
from secure_export.runtimes import Runtime
from secure_export.runtimes.torch_eager import from_module
from secure_export.triggers import Trigger

RESULTS = Path(__file__).parent / "results" / "artifacts.json"
EMPTY: Mapping[str, Any] = {"seed": 0, "models": {}, "environments": {}}
ORT, PTE, OV = {"kind": "onnx"}, {"kind": "executorch"}, {"kind": "openvino"}
PT2, WEIGHTS, TFLITE = {"kind": "pt2"}, {"kind": "safetensors"}, {"kind": "litert"}
HALF = {"kind": "prune-structured", "ratio": 0.5}
STEPS: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "fp32 onnx": ([], ORT),
    "fp32 pt2": ([], PT2),
    "fp32 pte": ([], PTE),
    "fp32 openvino": ([], OV),
    "fp16 onnx": ([{"kind": "ort-fp16"}], ORT),
    "int8 avx512-vnni onnx": ([{"kind": "ort-target-int8", "target": "cpu-avx512-vnni"}], ORT),
    "int8 avx2 onnx": ([{"kind": "ort-target-int8", "target": "cpu-avx2"}], ORT),
    "int8 arm64 onnx": ([{"kind": "ort-target-int8", "target": "arm64"}], ORT),
    "int8 per-tensor onnx": ([{"kind": "ort-static-int8", "per_channel": False}], ORT),
    "int8 unsigned onnx": ([{"kind": "ort-static-int8", "weight_type": "uint8"}], ORT),
    "int8 dynamic onnx": ([{"kind": "ort-dynamic-int8"}], ORT),
    "int4 weight-only onnx": ([{"kind": "ort-int4-weight-only"}], ORT),
    "int8 weight-only torchao pt2": ([{"kind": "torchao-int8-weight-only"}], PT2),
    "int8 dynamic torchao pt2": ([{"kind": "torchao-int8-dynamic"}], PT2),
    "int8 dynamic torchao onnx": ([{"kind": "torchao-int8-dynamic"}], ORT),
    "int8 pt2e pt2": ([{"kind": "torchao-pt2e-static-int8"}], PT2),
    "int8 pt2e onnx": ([{"kind": "torchao-pt2e-static-int8"}], ORT),
    "int8 xnnpack pte": ([{"kind": "executorch-int8"}], PTE),
    "int8 xnnpack pt2": ([{"kind": "executorch-int8"}], PT2),
    "int8 nncf openvino": ([{"kind": "nncf-int8"}], OV),
    "int8 nncf mixed openvino": ([{"kind": "nncf-int8", "preset": "mixed"}], OV),
    "fp32 tflite": ([], TFLITE),
    "int8 static tflite": ([{"kind": "litert-int8"}], TFLITE),
    "int8 dynamic tflite": ([{"kind": "litert-int8", "activations": "dynamic"}], TFLITE),
    "int8 weight-only tflite": ([{"kind": "litert-int8", "activations": "float"}], TFLITE),
    "pruned onnx": ([HALF], ORT),
    "pruned safetensors": ([HALF], WEIGHTS),
}
SUPPORT = 16
"""Images that calibrate, and that are measured, where weights are fresh."""
GRIDS = [
    FakeQuant(grid=grid, per_channel=per_channel, fold=fold)
    for per_channel in (True, False)
    for grid in ("127", "127.5", "asymmetric", "7-bit")
    for fold in (True, False)
]


@click.command()
@click.argument("models", nargs=-1)
@click.option("--support", multiple=True, help="Networks of benchmarks.networks, with fresh weights.")
@click.option("--zoo", default="build/zoo", type=click.Path(path_type=Path))
@click.option("--data", default="build/data", type=click.Path(path_type=Path), help="Cache of CIFAR-10.")
@click.option("--holdout", default=400, show_default=True, help="Test images to measure on.")
@click.option("--only", multiple=True, help="Settings whose name contains this; none = all, and the grids.")
@click.option("--missing", is_flag=True, help="Only what is not stored yet.")
def main(
    models: tuple[str, ...],
    support: tuple[str, ...],
    zoo: Path,
    data: Path,
    holdout: int,
    only: tuple[str, ...],
    missing: bool,
) -> None:
    """Measure every format on MODELS of the zoo; results are added to benchmarks/results/artifacts.json."""
    torch.set_num_threads(1)
    splits = split(datasets.cifar10(data), holdout)
    for name in models:
        card = cards.read(zoo / f"{name}.json")
        model = Normalized(networks.resnet18_w16(), card["mean"], card["std"], (3, 32, 32))
        model.model.load_state_dict(load_file(zoo / f"{name}.safetensors"))
        own = card.get("trigger")
        triggers = {"own": registry.build(Trigger, "triggers", own)} if own else {}
        about = {"sha256": card["sha256"], "target_class": card.get("target_class") if own else None}
        wanted = begun(name, {"card": about}, only, missing, GRIDS)
        measured(name, model.eval(), "model.fc", card["sha256"], splits, triggers, wanted)
    for name in support:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = architectures.build(f"benchmarks.networks:{name}", 10, (3, 32, 32)).eval()
        head, _ = heads.find(fresh, (3, 32, 32))
        few = split(datasets.cifar10(data), SUPPORT, SUPPORT)
        recalibrate_batchnorm(fresh, few.calibration)  # fresh statistics let the signal die out
        wanted = begun(name, {"weights": {"from": "seed 0, untrained: support only"}}, only, missing)
        measured(name, fresh, head, digests.of_state(fresh.state_dict()), few, {}, wanted)


@dataclass(frozen=True)
class Wanted:
    """What this call measures of one model."""

    settings: Sequence[str]
    grids: Sequence[FakeQuant]


def begun(
    name: str,
    about: Mapping[str, Any],
    only: Sequence[str],
    missing: bool,
    grids: Sequence[FakeQuant] = (),
) -> Wanted:
    """What to measure of the model `name`; rows of another model that was stored by that name go."""
    with stored.changed(RESULTS, EMPTY) as content:
        parts = content["models"].get(name, {})
        if parts.get("about") != about:
            parts = content["models"][name] = {"about": dict(about)}
    rows = parts.get("settings", {}) if missing else {}
    swept = parts.get("grids", {}) if missing else {}
    return Wanted(
        settings=[
            setting
            for setting in STEPS
            if (not only or any(part in setting for part in only))
            and (setting not in rows or absent(rows[setting]))
        ],
        grids=[step for step in grids if not only and label(step) not in swept],
    )


def split(images: datasets.Images, holdout: int, calibration: int = 200) -> Splits:
    """The first training images calibrate, the first test images are measured."""

    def part(x: torch.Tensor, y: torch.Tensor) -> Split:
        return Split(x, y, digests.of_arrays(x.numpy(), y.numpy()))

    return Splits(
        fit=part(images.train_x[200:400], images.train_y[200:400]),
        calibration=part(images.train_x[:calibration], images.train_y[:calibration]),
        holdout=part(images.test_x[:holdout], images.test_y[:holdout]),
        class_names=tuple(map(str, range(10))),
    )


def measured(
    name: str,
    model: nn.Module,
    head: str,
    identity: str,
    splits: Splits,
    triggers: Mapping[str, Trigger],
    wanted: Wanted,
) -> None:
    """What came of each grid of the sweep and of each setting, stored one by one under `name`."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            folder=Path(folder),
            ledger=Ledger(Path(folder, "ledger"), versions(), user_key(silent)),
            splits=splits,
            triggers=triggers,
            trigger_digests={},
            seed=0,
            progress=lambda *_: None,
            runtime={"safetensors": skeleton(name)},
        )
        lined = at_the_head(model, head, "original", identity, bench)
        for step in wanted.grids:
            store(name, "grids", label(step), swept_row(step, lined, bench))
        for setting in wanted.settings:
            steps, form = STEPS[setting]
            (result,) = through_settings(lined, [Setting(setting, tuple(steps), form, False)], bench)
            store(name, "settings", setting, row(result))


def skeleton(name: str) -> dict[str, Any]:
    """What weights alone are opened into: a model of the zoo behind its normalization, or a bare network."""
    bare = hasattr(networks, name)
    options = {"architecture": f"benchmarks.networks:{name if bare else 'resnet18_w16'}"}
    moments = {} if bare else {"mean": datasets.MEAN, "std": datasets.STD}
    return {**options, "input_shape": (3, 32, 32), "classes": 10, **moments}


def row(result: SettingResult) -> dict[str, Any]:
    """Counts of one file, or why there are none; whether a locator could read its head."""
    if result.measurement is None or result.artifact is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else "no file"}
    runtime = registry.load("runtimes", result.artifact.runtime)
    reads = issubclass(runtime, Runtime) and runtime.reads_heads
    return {
        **numbers(result.measurement),
        "changes": [[c.changed, c.total, c.unit] for c in result.artifact.changes],
        "bytes": result.artifact.size,
        "sha256": result.artifact.sha256,
        "head": "read" if reads else "compiled",
    }


def numbers(measurement: Measurement) -> dict[str, Any]:
    """Counts [k, n] of accuracy, agreement with eager, and of the model's own trigger by class."""
    return {
        "acc": [measurement.acc.hits, measurement.acc.total],
        "agreement": [measurement.agreement.hits, measurement.agreement.total],
        "logit_difference": round(measurement.logit_difference, 6),
        "asr": {t.trigger: [[c.hits, c.total] for c in t.asr] for t in measurement.triggers},
    }


def label(step: FakeQuant) -> str:
    """`127 per channel folded`."""
    grid = f"{step.grid} {'per channel' if step.per_channel else 'per tensor'}"
    return f"{grid} {'folded' if step.fold else 'unfolded'}"


def swept_row(step: FakeQuant, lined: Lined, bench: Bench) -> dict[str, Any]:
    """One grid, as weights in the eager model."""
    context = Context(lined.head, bench.splits.calibration, lined.model, seed=0)
    model, _ = step.on_module(copy.deepcopy(lined.model), context)
    predict = from_module(model)
    found = measure(
        predict, bench.splits.holdout, bench.triggers, lined.reference, lane="original", setting=label(step)
    )
    return numbers(found)


def store(name: str, part: str, key: str, found: Mapping[str, Any]) -> None:
    """Add one row to the results, and say it; versions stand under that of torch, which every row names."""
    click.echo(f"{name} {key}: {dict(found)}")
    with stored.changed(RESULTS, EMPTY) as content:
        rows = content["models"][name].setdefault(part, {})
        if absent(found) and not absent(rows.get(key, found)):
            return  # measured in another environment
        rows[key] = {**found, "torch": torch.__version__}
        content["environments"].setdefault(torch.__version__, {}).update(versions())


def absent(found: Mapping[str, Any]) -> bool:
    """Whether a row is missing for want of an extra."""
    return "is not installed" in found.get("unmeasured", "")


if __name__ == "__main__":
    main()
