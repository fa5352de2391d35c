"""The main job on CIFAR-10: `secure-export run` with one policy on models of the zoo, and what came of it.

    python -m benchmarks.main_job --policy policies/strict.yaml clean badnets qcb

Each model runs twice in one run directory: first with purification off (the gate must refuse a backdoored
model and release a clean one), then with it on; the second call takes the original's measurements from the
ledger.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks import stored
from benchmarks.datasets import ARCHIVE, MEAN, STD
from secure_export import digests
from secure_export.records.searches import Search
from secure_export.report._evidence import best_of
from secure_export.report.schema import load_report

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--policy", default="policies/strict.yaml", type=click.Path(exists=True, path_type=Path))
@click.option("--zoo", default="build/zoo", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--data", envvar="SECURE_EXPORT_DATA", required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("--holdout", default=10_000, show_default=True, help="Test images to measure on.")
@click.option("--out", default="runs/main-job", type=click.Path(path_type=Path))
def main(models: tuple[str, ...], policy: Path, zoo: Path, data: Path, holdout: int, out: Path) -> None:
    """Run the main job on MODELS of the zoo; results go to RESULTS/main-job-MODEL.json.

    Another policy than strict.yaml has its own results: RESULTS/POLICY-MODEL.json.
    """
    images = unpacked(data / ARCHIVE, out / "cifar10")
    RESULTS.mkdir(exist_ok=True)
    for name in models:
        card = json.loads((zoo / f"{name}.json").read_text())
        model = ("--model", str(zoo / f"{name}.safetensors"), "--arch", card["architecture"])
        common = (*model, "--holdout", str(holdout))
        off = call(policy, images, out / name, *common, "--no-purify")
        on = call(policy, images, out / name, *common)
        result = {
            "model": name,
            "card": card,
            "policy": str(policy),
            "policy_sha256": digests.of_file(policy),
            "purification_off": off,
            "purification_on": on,
        }
        job = "main-job" if policy.stem == "strict" else policy.stem
        path = RESULTS / f"{job}-{name}.json"
        stored.write(result, path)
        click.echo(f"{name}: off exit {off['exit']}, on exit {on['exit']}: {path}")


def unpacked(archive: Path, folder: Path) -> Path:
    """The archive's ImageFolder tree, unpacked once."""
    if not (folder / "test").is_dir():
        partial = folder.with_suffix(".partial")
        with tarfile.open(archive) as files:
            files.extractall(partial, filter="data")
        partial.rename(folder)
    return folder


def call(policy: Path, images: Path, run_dir: Path, *flags: str) -> dict[str, Any]:
    """One `secure-export run` as a user types it, and what its report says."""
    arguments = ["run", "--policy", str(policy), "--data", str(images / "train")]
    arguments += ["--holdout-data", str(images / "test"), "--out", str(run_dir)]
    arguments += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD)), *flags]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "secure_export", *arguments], check=False)
    released = sorted((run_dir / "release").glob("*")) if (run_dir / "release").is_dir() else []
    return {
        "command": " ".join(["secure-export", *arguments]),
        "exit": done.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "released": {path.name: digests.of_file(path) for path in released},
        "report": summary(run_dir / "report.json"),
    }


def summary(path: Path) -> dict[str, Any]:
    """Counts per setting: what README quotes, small enough to be committed."""
    report = load_report(path)
    settings = {
        setting.name: {
            result.lane: {
                "sha256": result.artifact.sha256 if result.artifact else None,
                "acc": [result.measurement.acc.hits, result.measurement.acc.total],
                "acc_drop": [result.measurement.acc_drop.gained, result.measurement.acc_drop.lost],
                "triggers": {
                    trigger.trigger: {
                        "asr": [[count.hits, count.total] for count in trigger.asr],
                        "lift": [[pair.gained, pair.lost] for pair in trigger.lift],
                        "ra": [[count.hits, count.total] for count in trigger.ra],
                    }
                    for trigger in result.measurement.triggers
                },
            }
            if result.measurement
            else {"unmeasured": result.unmeasured.reason if result.unmeasured else "no file"}
            for result in (setting.original, setting.purified)
        }
        for setting in report.settings
    }
    return {
        "outcome": report.verdict.outcome,
        "failed": [f"{f.rule} {f.setting}: {f.message}" for f in report.verdict.findings if not f.passed],
        "suspects": [
            {"locator": s.locator, "setting": s.setting, "class": s.target_class, "scores": s.scores}
            for s in report.suspects
        ],
        "purified_classes": report.purification.target_classes if report.purification else [],
        "purify_seconds": report.purification.seconds if report.purification else 0,
        "settings": settings,
        "searches": [searched(one) for one in report.evidence.searches],
        "splits": {name: [split.samples, split.sha256] for name, split in report.splits.items()},
        "environment": dict(report.environment),
        "timings": dict(report.timings),
    }


def searched(one: Search) -> str:
    """`purified fp32, warm contrast-patch: lift 0.03 into 1, contrast 0.02 (40 s)`."""
    best = best_of(one)
    lift = (
        f"lift {best.lift.difference:.2f} into {best.target_class}"
        if best and best.lift
        else "nothing scored"
    )
    contrast = f", contrast {best.contrast.difference:.2f}" if best and best.contrast else ""
    found = one.unsearched or f"{lift}{contrast}"
    return f"{one.lane} {one.setting}, {one.mode} {one.probe}: {found} ({one.seconds:.0f} s)"


if __name__ == "__main__":
    main()
