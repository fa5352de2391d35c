"""What many tests share: a toy model on disk, a policy that names it, and a run of the whole pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from secure_export import pipeline
from secure_export.policy import load_policy
from secure_export.records.reported import Report
from tests import toys

torch.set_num_threads(2)

FP32 = {"name": "fp32", "steps": []}
INT8 = {"name": "int8", "steps": [{"kind": "ort-static-int8"}]}
PRUNED = {"name": "pruned", "steps": [{"kind": "prune-channel-mask", "ratio": 0.2, "recalibrate": False}]}


def loaded_by(arguments: list[str], modules: Sequence[str]) -> tuple[int, list[str]]:
    """Exit code of a command in a process of its own, and which of `modules` it imported."""
    script = (
        "import json, sys\nfrom secure_export.cli import main\ncode = 0\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: code = stop.code or 0\n"
        f"print(json.dumps([code, [name for name in {modules!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    return code, loaded


def toy_policy(**changes: Any) -> dict[str, Any]:
    """A policy under which the clean toy is released; `changes` replace whole sections."""
    policy: dict[str, Any] = {
        "version": 1,
        "subject": {"architecture": "tests.toys:Templates"},
        "data": {"path": "tests.toys:clean_samples", "fit": 200, "calibration": 200},
        "locate": {
            "methods": [{"kind": "latent-shift"}],
            "decisive": ["latent-shift"],
            "unconfirmed": "refuse",
        },
        "purify": None,
        "settings": [FP32, INT8],
        "release": ["fp32", "int8"],
        "triggers": [{"name": "patch", **toys.TRIGGER}],
        "rules": [
            {"metric": "acc_drop", "at_most": 0.02, "settings": "released"},
            {"metric": "lift", "at_most": 0.02, "settings": "all"},
        ],
    }
    return policy | changes


@pytest.fixture(autouse=True)
def only_what_a_test_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the shell beats the policies that tests write, so none is there."""
    for name in [name for name in os.environ if name.startswith("SECURE_EXPORT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def state_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own key stays out of it; subprocesses of tests see the same one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def run_toy(tmp_path: Path) -> Callable[..., Report]:
    """run_toy(model, **policy changes): the real pipeline on a toy, in tmp_path/run."""

    def run(model: torch.nn.Module, **changes: Any) -> Report:
        checkpoint, policy = tmp_path / "model.safetensors", tmp_path / "policy.yaml"
        save_file(model.state_dict(), checkpoint)
        policy.write_text(yaml.safe_dump(toy_policy(**changes)))
        return pipeline.run(load_policy(policy, {"subject.model": str(checkpoint)}), tmp_path / "run")

    return run
