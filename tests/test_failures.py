"""What a stranger may hand in: one clear line, the right exit code, no traceback, nothing released."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from secure_export import defence, digests, lane, loading, pipeline
from secure_export.cli import main
from secure_export.policy import SubjectSpec
from tests import toys
from tests.conftest import toy_policy


class Job:
    """A job that would be released, in a folder; each test spoils one thing and calls run()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.safetensors"
        self.policy: dict[str, Any] = toy_policy(settings=[{"name": "fp32", "steps": []}], release=["fp32"])
        self.policy_text: str | None = None
        self.state = toys.clean().state_dict()
        self.out = folder / "run"

    def run(self, *flags: str) -> Result:
        if not self.model.exists() and self.state:
            save_file(self.state, self.model)
        path = self.folder / "strict.yaml"
        path.write_text(self.policy_text or yaml.safe_dump(self.policy))
        arguments = ["run", "--policy", str(path), "--model", str(self.model), "--out", str(self.out), *flags]
        return CliRunner().invoke(main, arguments)

    def images(self, *, side: int = 8, per_class: int = 40) -> Path:
        """An ImageFolder tree of grey pictures, one brightness a class."""
        root = self.folder / "images"
        rng = np.random.default_rng(0)
        for k in range(toys.CLASSES):
            (root / f"class{k}").mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 60, (side, side), dtype=np.uint8) + 48 * k
                Image.fromarray(pixels.astype(np.uint8), "L").save(root / f"class{k}" / f"{i}.png")
        self.policy["data"] = {"path": str(root), "channels": 1, "fit": 40, "calibration": 40}
        return root


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def refused(job: Job, result: Result, code: int, *words: str) -> None:
    """One line that says `words`, exit `code`, no traceback, nothing released."""
    assert result.exit_code == code, result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.output
    for word in words:
        assert word in result.output
    assert not (job.out / "release").exists()


def test_the_job_itself_is_released(job: Job) -> None:
    result = job.run()
    assert result.exit_code == 0, result.output
    assert (job.out / "release" / "fp32.onnx").is_file()


# ---- the checkpoint -------------------------------------------------------------------------------------


def test_missing_file(job: Job) -> None:
    job.state = {}
    refused(job, job.run(), 4, "no such model file", "model.safetensors")


def test_truncated_safetensors(job: Job) -> None:
    save_file(job.state, job.model)
    job.model.write_bytes(job.model.read_bytes()[:-100])
    refused(job, job.run(), 4, "model.safetensors")


def test_missing_and_unexpected_keys_are_named(job: Job) -> None:
    job.state["head.extra"] = torch.zeros(2)
    del job.state["conv.bias"]
    refused(job, job.run(), 4, "conv.bias", "head.extra")


def test_nan_weights(job: Job) -> None:
    job.state["head.weight"][0, 0] = float("nan")
    refused(job, job.run(), 4, "head.weight")


def test_model_with_one_output(job: Job) -> None:
    job.policy["subject"]["architecture"] = "tests.test_failures:one_output"
    job.state = one_output().state_dict()
    refused(job, job.run(), 4, "output")


def one_output() -> torch.nn.Module:
    """A regressor, not a classifier."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))


def test_unknown_architecture(job: Job) -> None:
    job.policy["subject"]["architecture"] = "tests.toys:no_such_factory"
    refused(job, job.run(), 4, "no_such_factory")


def test_labels_beyond_the_head(job: Job) -> None:
    job.policy["data"]["path"] = "tests.test_failures:five_classes"
    refused(job, job.run(), 4, "class")


def five_classes() -> tuple[np.ndarray, np.ndarray]:
    """Samples with a label that the toy's head does not have."""
    inputs, labels = toys.samples(1000)
    labels[::7] = toys.CLASSES
    return inputs, labels


# ---- the clean samples ----------------------------------------------------------------------------------


def test_empty_class_folder(job: Job) -> None:
    (job.images() / "class9").mkdir()
    refused(job, job.run(), 4, "class9")


def test_corrupt_image(job: Job) -> None:
    (job.images() / "class2" / "7.png").write_bytes(b"\x89PNG no picture")
    refused(job, job.run(), 4, "7.png")


def test_mixed_image_sizes(job: Job) -> None:
    root = job.images()
    Image.new("L", (9, 8)).save(root / "class1" / "odd.png")
    refused(job, job.run(), 4, "odd.png", "resize")


def test_no_such_data(job: Job) -> None:
    job.policy["data"]["path"] = "nowhere/images"
    refused(job, job.run(), 4, "nowhere")


# ---- the policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.update(colour="red"), ["colour"]),
        (lambda p: p.update(rules=[]), ["rules"]),
        (lambda p: p.update(settings=[]), ["settings"]),
        (
            lambda p: p["settings"].append(
                {"name": "half", "steps": [{"kind": "prune-structured", "ratio": 1.5}]}
            ),
            ["settings.1.steps.0.ratio", "1.5"],
        ),
        (
            lambda p: p["settings"].append({"name": "half", "steps": [{"kind": "prune-structred"}]}),
            ["prune-structured"],
        ),
    ],
)
def test_unusable_policy(job: Job, spoil: Callable[[dict[str, Any]], None], words: list[str]) -> None:
    spoil(job.policy)
    refused(job, job.run(), 2, "strict.yaml:", *words)


def test_duplicate_key(job: Job) -> None:
    job.policy_text = yaml.safe_dump(job.policy) + "seed: 1\nseed: 2\n"
    refused(job, job.run(), 2, "strict.yaml:", "seed")


def test_samples_that_cannot_decide_say_how_many_could(job: Job) -> None:
    job.policy["data"] |= {"holdout": 400}
    job.policy["rules"][1] = {"metric": "lift", "at_most": 0.001, "settings": "all"}
    result = job.run()
    assert result.exit_code == 4
    assert not (job.out / "release").exists()
    report = pipeline_report(job)
    undecided = [finding for finding in report["verdict"]["findings"] if finding["passed"] is None]
    assert [finding["rule"] for finding in undecided] == ["lift"]
    assert undecided[0]["needed"] > 2000
    assert str(undecided[0]["needed"]) in result.output


def pipeline_report(job: Job) -> dict[str, Any]:
    """report.json as data."""
    import json

    loaded: dict[str, Any] = json.loads((job.out / "report.json").read_text())
    return loaded


def test_another_architecture_or_normalization_is_another_model(job: Job) -> None:
    """What the ledger keeps of one is not shipped for the other, though the checkpoint is the same file."""

    def shipped(*flags: str) -> str:
        assert job.run(*flags).exit_code == 0
        return digests.of_file(job.out / "release" / "fp32.onnx")

    plain = shipped()
    behind = shipped("--mean", "0.1", "--std", "0.9")
    other = shipped("--arch", "tests.toys:Doubled")
    assert len({plain, behind, other}) == 3
    assert shipped() == plain


def test_an_edited_architecture_is_another_model(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, the same name, other code: nothing that was kept of the old one is taken for the new."""
    save_file(toys.clean().state_dict(), job.model)
    named = SubjectSpec(architecture="tests.toys:Templates")
    subject = loading.as_named(job.model, named, (1, 8, 8))
    monkeypatch.setattr(toys.Templates, "forward", toys.Doubled.forward)
    edited = loading.as_named(job.model, named, (1, 8, 8))
    assert subject.sha256 == edited.sha256
    assert subject.identity != edited.identity


def test_missing_class_folder(job: Job) -> None:
    root = job.images()
    shutil.rmtree(root / "class1")
    refused(job, job.run(), 4, "the data has 3 classes, the model 4 outputs")


def test_class_whose_samples_all_have_copies_elsewhere(job: Job) -> None:
    root = job.images()
    job.policy["data"] |= {"fit": 20, "calibration": 20}
    shutil.rmtree(root / "class2")
    shutil.copytree(root / "class1", root / "class2")
    refused(job, job.run(), 4, "has no sample of its own")


def test_run_directory_in_the_data(job: Job) -> None:
    job.out = job.images() / "run"
    refused(job, job.run(), 2, "lies in the data")


# ---- the machine ----------------------------------------------------------------------------------------


def test_destination_that_cannot_be_made(job: Job) -> None:
    job.out = job.folder / "file" / "run"
    (job.folder / "file").write_text("no folder")
    refused(job, job.run(), 4, "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(job: Job) -> None:
    job.out = job.folder / "disk" / "run"
    job.out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(job.out.parent)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    try:
        refused(job, job.run(), 4, "space")
    finally:
        subprocess.run(["umount", str(job.out.parent)], check=True)


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        (pipeline, "load"),
        (pipeline, "at_the_head"),
        (lane, "make"),
        (lane, "measure"),
        (defence, "locate"),
        (defence, "purify"),
        (pipeline, "judge"),
        (pipeline, "release"),
    ],
)
def test_ctrl_c_in_every_stage_releases_nothing_and_resumes(
    job: Job, module: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupted)
        result = job.run()
    assert result.exit_code == 130, result.output
    assert "resumes" in result.output
    assert "Traceback" not in result.output
    assert not (job.out / "release").exists()
    assert job.run().exit_code == 0


def test_killed_process_leaves_no_release_and_resumes(job: Job) -> None:
    save_file(job.state, job.model)
    (job.folder / "strict.yaml").write_text(yaml.safe_dump(job.policy))
    killed = (
        "import os, sys\nfrom secure_export import pipeline\n"
        "pipeline.judge = lambda *_: os._exit(9)\n"
        "from secure_export.cli import main\nmain(sys.argv[1:])\n"
    )
    arguments = ["run", "--policy", str(job.folder / "strict.yaml"), "--model", str(job.model)]
    command = [sys.executable, "-c", killed, *arguments, "--out", str(job.out)]
    root = Path(__file__).parents[1]
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 9
    assert not (job.out / "release").exists()
    assert job.run().exit_code == 0
