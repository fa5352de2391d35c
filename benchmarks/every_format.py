"""One `secure-export run` whose policy names every format: what holds, what does not, what cannot be made.

    python -m benchmarks.every_format vit_small

The network has fresh weights, so the run says what the toolchains do and nothing of accuracy. Formats whose
extra is not installed are left out: a policy that names one cannot be used. Results go to
benchmarks/results/every-format.json; --table draws them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from benchmarks import sleeping, stored
from benchmarks.artifacts import STEPS
from secure_export import architectures, registry
from secure_export.compressors import Compressor
from secure_export.errors import PolicyError
from secure_export.formats import Format
from secure_export.records.measured import Finding, SettingResult
from secure_export.report.schema import load_report

RESULTS = Path(__file__).parent / "results" / "every-format.json"
HOLDOUT = 32


@click.command()
@click.argument("network", default="vit_small")
@click.option("--data", default="build/data", type=click.Path(path_type=Path), help="Cache of CIFAR-10.")
@click.option("--only", multiple=True, help="Settings whose name contains this; none = all.")
@click.option("--without", multiple=True, help="But not those whose name contains this.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to keep and to go on in.")
@click.option("--table", is_flag=True, help="Print the stored results as Markdown; measure nothing.")
def main(
    network: str, data: Path, only: tuple[str, ...], without: tuple[str, ...], out: Path | None, table: bool
) -> None:
    """Judge a fresh NETWORK of benchmarks.networks under a policy of every format that is installed."""
    if table:
        click.echo(drawn(json.loads(RESULTS.read_text())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        fresh = architectures.build(f"benchmarks.networks:{network}", 10, (3, 32, 32))
        save_file(fresh.state_dict(), folder / "fresh.safetensors")
        (folder / "every-format.yaml").write_text(json.dumps(policy(only, without), indent=1))
        given = sleeping.samples(data, HOLDOUT, folder)
        found = judged(folder, network, given, out or folder / "run")
    with stored.changed(RESULTS, {"seed": 0, "networks": {}}) as content:
        content["networks"][" ".join([network, *only, *(f"-{part}" for part in without)])] = found
    click.echo(drawn(content))


def policy(only: tuple[str, ...], without: tuple[str, ...]) -> dict[str, Any]:
    """Every format that can be made here, all of them released; limits that few samples can decide."""
    settings = [
        {"name": name.replace(" ", "-"), "steps": steps, "format": form}
        for name, (steps, form) in STEPS.items()
        if installed(steps, form)
        and (not only or any(part in name for part in only))
        and not any(part in name for part in without)
    ]
    return {
        "version": 1,
        "data": {"fit": 32, "calibration": 16},
        "locate": {"methods": [{"kind": "latent-shift"}], "decisive": ["latent-shift"]},
        "purify": None,
        "settings": settings,
        "release": [setting["name"] for setting in settings],
        "triggers": [{"name": "badnets", "kind": "badnets", "size": 3}],
        "rules": [
            {"metric": "acc_drop", "at_most": 0.2, "settings": "released"},
            {"metric": "agreement", "at_least": 0.75, "settings": "released"},
            {"metric": "lift", "at_most": 0.3, "settings": "all"},
        ],
    }


def installed(steps: list[dict[str, Any]], form: Mapping[str, str]) -> bool:
    """Whether a policy that names these can be used here."""
    try:
        for step in steps:
            registry.build(Compressor, "compressors", step)
        registry.build(Format, "formats", form)
    except PolicyError:
        return False
    return True


def judged(folder: Path, network: str, given: list[str], out: Path) -> dict[str, Any]:
    """The run as a user types it: its exit code, and what became of each setting."""
    arguments = ["run", "--policy", str(folder / "every-format.yaml"), *given, "--quiet"]
    arguments += ["--model", str(folder / "fresh.safetensors"), "--arch", f"benchmarks.networks:{network}"]
    began = time.monotonic()
    command = [sys.executable, "-m", "secure_export", *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Traceback" in done.stderr or not (out / "report.json").exists():
        raise click.ClickException(done.stderr)
    report = load_report(out / "report.json")
    said = {
        setting.name: [f for f in report.verdict.findings if f.setting == setting.name]
        for setting in report.settings
    }
    return {
        "exit": done.returncode,
        "outcome": report.verdict.outcome,
        "released": (out / "release").exists(),
        "seconds": round(time.monotonic() - began),
        "settings": {s.name: row(s.purified, said[s.name]) for s in report.settings},
        "environment": dict(report.environment),
    }


def row(result: SettingResult, findings: list[Finding]) -> dict[str, Any]:
    """What one file did, and every rule that it does not pass."""
    broken = [f"{f.rule}: {f.message}" for f in findings if f.passed is not True]
    if result.measurement is None or result.artifact is None:
        return {"unmeasured": result.unmeasured.reason if result.unmeasured else "no file", "broken": broken}
    same = result.measurement.agreement
    return {
        "bytes": result.artifact.size,
        "agreement": [same.hits, same.total],
        "logit_difference": round(result.measurement.logit_difference, 6),
        "broken": broken,
    }


def drawn(content: Mapping[str, Any]) -> str:
    """The stored results as Markdown: what became of each run, then files and reasons by network."""
    lines = [
        f"- `{name}`: {len(run['settings'])} files, {run['outcome']}, exit {run['exit']}, {run['seconds']} s"
        for name, run in content["networks"].items()
    ]
    files: dict[str, dict[str, Any]] = {}
    for name, run in content["networks"].items():
        known = files.setdefault(name.split()[0], {})
        known |= {setting: counts for setting, counts in run["settings"].items() if setting not in known}
    settings = list(dict.fromkeys(name for known in files.values() for name in known))
    lines += ["", f"| setting | {' | '.join(files)} |", "|---" * (len(files) + 1) + "|"]
    for name in settings:
        lines.append(f"| {name} | {' | '.join(cell(known.get(name)) for known in files.values())} |")
    lines.append("")
    for network, known in files.items():
        for name, counts in known.items():
            reasons = [f"unmeasured: {counts['unmeasured']}"] if "unmeasured" in counts else counts["broken"]
            lines += [f"- {network}, {name}: {reason}" for reason in reasons]
    return "\n".join(lines)


def cell(counts: Mapping[str, Any] | None) -> str:
    """Agreement and the rules that one file does not pass."""
    if counts is None:
        return ""
    if "unmeasured" in counts:
        return "unmeasured"
    hits, total = counts["agreement"]
    rules = ", ".join(dict.fromkeys(line.partition(":")[0] for line in counts["broken"]))
    return f"{hits}/{total}, {counts['bytes'] / 1e6:.1f} MB{f': {rules}' if rules else ''}"


if __name__ == "__main__":
    main()
