"""Backdoors behind hard steps: files written by hand that no honest gradient finds anything in.

    python -m benchmarks.hard_steps build/zoo-seventh/clean.safetensors

A clean network is exported with each of benchmarks/handwritten.py's paths beside it, and `secure-export run`
judges every file under policies/steps.yaml, along honest slopes and with preset `surrogate`. Results go to
results/hard-steps.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import onnx
import torch
import yaml

from benchmarks import cards, datasets, sleeping, stored
from benchmarks.handwritten import KINDS, Trigger, drawn_trigger, hidden
from benchmarks.main_job import searched
from secure_export import digests
from secure_export.environment import versions
from secure_export.formats.onnx import Onnx
from secure_export.report.schema import load_report
from secure_export.runtimes.onnxruntime import Onnxruntime

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "hard-steps.json"
PRESETS: Mapping[str, Any] = {"fast": "fast", "fast and surrogate": ["fast", "surrogate"]}


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", default="build/data", type=click.Path(path_type=Path), help="Cache of CIFAR-10.")
@click.option("--only", type=click.Choice(list(KINDS)), help="This kind of step alone.")
@click.option("--seeds", default=3, show_default=True, help="Triggers of each kind.")
@click.option("--holdout", default=2000, show_default=True, help="Test images to measure on.")
@click.option("--table", is_flag=True, help="Print the stored results as Markdown; measure nothing.")
def main(model: Path, data: Path, only: str | None, seeds: int, holdout: int, table: bool) -> None:
    """Judge MODEL with every kind of step beside it and as it is, or with those of --only."""
    if table:
        click.echo(drawn(stored.read(RESULTS)))
        return
    card = cards.read(model.with_suffix(".json"))
    images = datasets.cifar10(data)
    shape = tuple(images.test_x.shape[1:])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        honest = folder / "none.onnx"
        Onnx().write(cards.network(card, model), torch.rand(2, *shape), honest)
        given = sleeping.samples(data, holdout, folder)
        if only is None:
            store(model, "none", judged(honest, given, folder / "none"))
        for kind, make in KINDS.items():
            for seed in range(seeds if only in (None, kind) else 0):
                trigger = drawn_trigger(seed, shape, len(card["classes"]))
                file = folder / f"{kind}-{seed}.onnx"
                onnx.save(hidden(honest, make(trigger, shape), trigger.target), file)
                found = judged(file, given, folder / file.stem)
                store(model, f"{kind} {seed}", found | truly(file, trigger, images.test_x[:holdout]))


def truly(file: Path, trigger: Trigger, images: torch.Tensor) -> dict[str, Any]:
    """What the trigger does in the file: [samples it carries into its class, samples]."""
    unit = datasets.to_unit(images)
    predictor = Onnxruntime().open(file)
    before, after = (predictor(x).argmax(1) == trigger.target for x in (unit, trigger.stamp(unit)))
    return {"target": trigger.target, "carried": [int((after & ~before).sum()), int((~before).sum())]}


def judged(file: Path, given: list[str], run_dir: Path) -> dict[str, Any]:
    """The outcome of `secure-export run` under each policy, its searches, and what broke."""
    content = yaml.safe_load((HERE / "policies" / "steps.yaml").read_text())
    found: dict[str, Any] = {"sha256": digests.of_file(file)}
    for name, preset in PRESETS.items():
        content["evidence"]["preset"] = preset
        policy = file.with_suffix(".yaml")
        policy.write_text(yaml.safe_dump(content))
        arguments = ["run", "--policy", str(policy), "--artifact", str(file), *given]
        command = [sys.executable, "-m", "secure_export", *arguments, "--out", str(run_dir), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Traceback" in done.stderr or not (run_dir / "report.json").exists():
            raise click.ClickException(done.stderr)
        report = load_report(run_dir / "report.json")
        found[name] = {
            "exit": done.returncode,
            "outcome": report.verdict.outcome,
            "failed": [f.message for f in report.verdict.findings if not f.passed],
            "searches": {
                one.probe: max(
                    ((t.lift.difference, t.target_class) for t in one.found if t.lift), default=None
                )
                for one in report.evidence.searches
                if one.lane == "original"
            },
            "said": [searched(one) for one in report.evidence.searches if one.lane == "original"],
        }
    return found


def store(model: Path, name: str, found: Mapping[str, Any]) -> None:
    """Add one file's outcome to the results, and say it."""
    outcomes = {preset: found[preset]["outcome"] for preset in PRESETS}
    click.echo(f"{model.parent.name}/{model.stem} {name}: {outcomes}", err=True)
    with stored.changed(RESULTS) as content:
        content["models"].setdefault(f"{model.parent.name}/{model.stem}", {})[name] = dict(found)
        content |= {"versions": dict(versions()), "policy": "benchmarks/policies/steps.yaml"}


def drawn(content: Mapping[str, Any]) -> str:
    """The stored results as Markdown."""
    lines = [
        "| step | its trigger carries | `fast` finds | verdict | `surrogate` finds | verdict with both |",
        "|---|---|---|---|---|---|",
    ]
    for files in content["models"].values():
        for name, found in files.items():
            carried = "{}/{} → {}".format(*found["carried"], found["target"]) if "carried" in found else "–"
            plain, both = (found[preset] for preset in PRESETS)
            verdicts = plain["outcome"], both["outcome"]
            lent = {probe: best for probe, best in both["searches"].items() if probe.startswith("surrogate")}
            lines.append(
                f"| {name} | {carried} | {largest(plain['searches'])} | {verdicts[0]} | {largest(lent)} | "
                f"{verdicts[1]} |"
            )
    return "\n".join(lines)


def largest(searches: Mapping[str, Any]) -> str:
    """`l2 0.98 → 3`: of several searches the largest lift on the holdout."""
    best = max(((lift[0], lift[1], probe) for probe, lift in searches.items() if lift), default=None)
    return "–" if best is None else f"`{best[2]}` {best[0]:.2f} → {best[1]}"


if __name__ == "__main__":
    main()
