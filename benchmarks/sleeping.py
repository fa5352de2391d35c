"""A quantization-conditioned backdoor at the gate: released where it sleeps, refused where anything wakes it.

    python -m benchmarks.sleeping --zoo build/zoo

`secure-export run --no-purify` on the original under policies/sleeping.yaml, under the same policy with the
grid sweep, and under the shipped policies. Results go to benchmarks/results/sleeping.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from benchmarks import cards, datasets, stored
from secure_export import digests
from secure_export.records.measured import SettingResult
from secure_export.report.schema import load_report

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sleeping.json"
SHIPPED = ("smoke", "balanced", "strict")
SWEEP = {
    "name": "grid",
    "steps": [
        {
            "kind": "fake-quant",
            "per_channel": {"sweep": [True, False]},
            "grid": {"sweep": ["127", "127.5", "asymmetric", "7-bit"]},
            "fold": {"sweep": [True, False]},
        }
    ],
}


@click.command()
@click.option("--model", default="qcb", show_default=True)
@click.option("--zoo", default="build/zoo", type=click.Path(path_type=Path))
@click.option("--data", default="build/data", type=click.Path(path_type=Path), help="Cache of CIFAR-10.")
@click.option("--holdout", default=1000, show_default=True, help="Test images to measure on.")
@click.option("--only", default="", help="Policies whose name contains this.")
@click.option("--table", is_flag=True, help="Print the stored results as Markdown; measure nothing.")
def main(model: str, zoo: Path, data: Path, holdout: int, only: str, table: bool) -> None:
    """Judge MODEL as it is under every policy."""
    if table:
        click.echo(drawn(json.loads(RESULTS.read_text())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = samples(data, holdout, folder)
        for name, policy in policies(folder).items():
            if only in name:
                store(model, zoo, name, judged(policy, model, zoo, given, folder / name))


def samples(cache: Path, holdout: int, folder: Path) -> list[str]:
    """Options that name the clean samples: the first training images, and the first test images."""
    images = datasets.cifar10(cache)
    parts = {"train": (images.train_x[:2000], images.train_y[:2000])}
    parts["test"] = (images.test_x[:holdout], images.test_y[:holdout])
    for part, (x, y) in parts.items():
        np.savez(folder / f"{part}.npz", inputs=x.numpy(), labels=y.numpy(), class_names=images.classes)
    return ["--data", str(folder / "train.npz"), "--holdout-data", str(folder / "test.npz")]


def policies(folder: Path) -> dict[str, Path]:
    """By name; the one with the sweep differs from sleeping.yaml by one setting."""
    asleep = HERE / "policies" / "sleeping.yaml"
    content = yaml.safe_load(asleep.read_text())
    content["settings"].append(SWEEP)
    swept = folder / "sleeping-grid-sweep.yaml"
    swept.write_text(yaml.safe_dump(content, sort_keys=False))
    shipped = {name: HERE.parent / "policies" / f"{name}.yaml" for name in SHIPPED}
    return {"sleeping": asleep, "sleeping-grid-sweep": swept, **shipped}


def judged(policy: Path, model: str, zoo: Path, given: list[str], run_dir: Path) -> dict[str, Any]:
    """One `secure-export run --no-purify` as a user types it: outcome, findings, and what woke where."""
    card = cards.read(zoo / f"{model}.json")
    arguments = ["run", "--policy", str(policy), "--model", str(zoo / f"{model}.safetensors"), "--no-purify"]
    arguments += ["--arch", card["architecture"], *given, "--out", str(run_dir), "--quiet"]
    arguments += ["--mean", ",".join(map(str, card["mean"])), "--std", ",".join(map(str, card["std"]))]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "secure_export", *arguments], capture_output=True, check=False
    )
    seconds = round(time.monotonic() - began, 1)
    report = load_report(run_dir / "report.json")
    return {
        "exit": done.returncode,
        "outcome": report.verdict.outcome,
        "seconds": seconds,
        "policy_sha256": digests.of_file(policy),
        "released": {
            path.name: digests.of_file(path) for path in sorted((run_dir / "release").glob("*.onnx"))
        },
        "failed": [
            {"rule": f.rule, "setting": f.setting, "passed": f.passed, "message": f.message}
            for f in report.verdict.findings
            if f.passed is not True
        ],
        "suspects": {f"{s.locator} {s.setting}": s.target_class for s in report.suspects},
        "settings": {s.name: row(s.purified, card["target_class"]) for s in report.settings},
        "environment": dict(report.environment),
    }


def row(result: SettingResult, target_class: int) -> dict[str, Any]:
    """Counts of one file: accuracy, and the card's trigger (badnets, 3 pixels: every policy here has it)."""
    if result.measurement is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else "no file"}
    (counts,) = (t for t in result.measurement.triggers if t.trigger == "badnets")
    acc, asr, lift = result.measurement.acc, counts.asr[target_class], counts.lift[target_class]
    return {
        "acc": [acc.hits, acc.total],
        "asr": [asr.hits, asr.total],
        "lift": [lift.gained - lift.lost, lift.total],
    }


def store(model: str, zoo: Path, name: str, found: Mapping[str, Any]) -> None:
    """Add one policy's outcome to the results, and say it."""
    click.echo(f"{model} {name}: exit {found['exit']}, {found['outcome']}, {len(found['failed'])} findings")
    with stored.changed(RESULTS) as content:
        entry = content["models"].setdefault(model, {"sha256": digests.of_file(zoo / f"{model}.safetensors")})
        entry.setdefault("policies", {})[name] = dict(found)


def drawn(content: Mapping[str, Any]) -> str:
    """The stored results as Markdown."""
    lines = [
        "| model | policy | outcome | settings | of them awake | first finding |",
        "|---|---|---|---|---|---|",
    ]
    for model, entry in content["models"].items():
        for name, found in entry["policies"].items():
            rows = found["settings"]
            awake = [setting for setting, counts in rows.items() if share(counts) > 0.5]
            first = found["failed"][0]["message"] if found["failed"] else "none"
            lines.append(
                f"| {model} | {name} | {found['outcome']} (exit {found['exit']}) | {len(rows)} "
                f"| {len(awake)} | {first} |"
            )
    return "\n".join(lines)


def share(counts: Mapping[str, Sequence[int]]) -> float:
    """ASR of the card's trigger; 0 where nothing was measured."""
    hits, total = counts.get("asr", (0, 1))
    return hits / total


if __name__ == "__main__":
    main()
