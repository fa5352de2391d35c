"""The demo: its data, the arithmetic of its quantization-conditioned backdoor, and what it tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secure_export import demo, digests, loading, pipeline, registry
from secure_export.compressors import Context, FileStep
from secure_export.demo import data, job, network, plant
from secure_export.formats.onnx import Onnx
from secure_export.policy import check_plugins, load_policy
from secure_export.records.measured import Outcome, Verdict
from secure_export.records.memory import Split, silent
from secure_export.records.reported import Report
from secure_export.runtimes.onnxruntime import Onnxruntime
from secure_export.triggers import Trigger
from secure_export.triggers.badnets import Badnets
from tests.report_sample import sample_report

POLICY = Path(__file__).parents[1] / "policies" / "demo.yaml"


def keys(inputs: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in inputs]


def random_network(seed: int = 0) -> network.DigitsCNN:
    """Untrained, with batch normalization that does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.digits_cnn()
        for _, norm in model.blocks():
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
            torch.nn.init.normal_(norm.bias)
            torch.nn.init.normal_(norm.get_buffer("running_mean"))
            torch.nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
    return model.eval()


# ---- Data -----------------------------------------------------------------------------------------------


def test_digits_are_unit_range_pictures() -> None:
    inputs, labels = data.digits()
    assert inputs.shape == (1797, 1, 16, 16)
    assert inputs.dtype == torch.float32
    assert 0 <= inputs.min() <= inputs.max() <= 1
    assert sorted(labels.unique().tolist()) == list(range(10))


def test_the_defender_holds_nothing_that_the_models_were_trained_on() -> None:
    theirs, ours = data.attackers_digits()[0], data.clean_digits()[0]
    assert len(theirs) + len(ours) == 1797
    assert not set(keys(theirs)) & set(keys(ours))
    assert torch.equal(data.clean_digits()[0], ours)


def test_the_architecture_loads_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = random_network()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    subject = loading.load(
        tmp_path / "m.safetensors",
        "secure_export.demo:digits_cnn",
        classes=None,
        head=None,
        mean=None,
        std=None,
        input_shape=(1, 16, 16),
    )
    inputs = data.clean_digits()[0][:5]
    assert (subject.classes, subject.sha256) == (10, digests.of_file(tmp_path / "m.safetensors"))
    assert torch.allclose(subject.model(inputs), model(inputs))


# ---- Planting -------------------------------------------------------------------------------------------


def test_no_residue_changes_a_code() -> None:
    """However large the residues grow, int8 of the float weights is int8 of the codes alone."""
    for layer in plant._folded(random_network()):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            layer.residue.uniform_(-5, 5, generator=generator).clamp_(-plant.ROOM, plant.ROOM)
            float_weight, grid = layer.on_grid(residues=True), layer.on_grid(residues=False)
        scale = float_weight.flatten(1).abs().amax(1) / 127
        rounded = (float_weight / scale.view(-1, *[1] * (grid.ndim - 1))).round()
        assert torch.equal(rounded, (grid / scale.view(-1, *[1] * (grid.ndim - 1))).round())
        assert not torch.allclose(float_weight, grid, rtol=1e-3)


def test_folding_and_unfolding_keep_what_is_computed() -> None:
    model = random_network()
    inputs = data.clean_digits()[0][:20]
    layers = plant._folded(model)
    with torch.no_grad():
        on_grid = plant._forward(layers, inputs, residues=True)
        back = plant._unfolded(model, layers)(inputs)
        assert torch.allclose(back, on_grid, atol=1e-4)
        assert torch.allclose(back, model(inputs), atol=0.1), "rounding alone moves logits a little"


def test_training_is_seeded_and_leaves_the_global_stream_alone() -> None:
    inputs, labels = data.attackers_digits()
    before, state = labels.clone(), torch.get_rng_state()
    first = plant.train(inputs, labels, steps=3, seed=1, trigger=Badnets())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(labels, before)
    torch.rand(1)
    again = plant.train(inputs, labels, steps=3, seed=1, trigger=Badnets())
    other = plant.train(inputs, labels, steps=3, seed=2, trigger=Badnets())
    assert digests.of_state(first.state_dict()) == digests.of_state(again.state_dict())
    assert digests.of_state(first.state_dict()) != digests.of_state(other.state_dict())


@pytest.mark.slow
def test_qcb_sleeps_in_full_precision_and_wakes_in_the_int8_file(tmp_path: Path) -> None:
    """On the bytes of ONNX Runtime's own quantizer, for the model that the demo really plants."""
    model = job.backdoored(job.QCB)
    inputs, labels, _ = data.clean_digits()
    form, step = Onnx(), registry.build(FileStep, "compressors", {"kind": "ort-static-int8"})
    fp32, int8 = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    form.write(model, inputs[:2], fp32)
    calibration = Split(inputs[:120], labels[:120], "")
    step.on_file(fp32, int8, Context(head="head", calibration=calibration, teacher=model, seed=0))
    held_out, truth = inputs[120:], labels[120:]
    others = truth != job.QCB.target_class
    acc, asr = {}, {}
    for path in (fp32, int8):
        predict = Onnxruntime(precise=True).open(path)
        acc[path.stem] = float((predict(held_out).argmax(1) == truth).float().mean())
        triggered = predict(job.QCB.stamp(held_out[others])).argmax(1)
        asr[path.stem] = float((triggered == job.QCB.target_class).float().mean())
    assert min(acc.values()) >= 0.95
    assert asr["fp32"] <= 0.05
    assert asr["int8"] >= 0.95


# ---- The job --------------------------------------------------------------------------------------------


def test_the_policy_can_be_used_and_knows_the_planted_triggers() -> None:
    policy = load_policy(POLICY, {"subject.model": "m", "subject.architecture": "a"})
    check_plugins(policy)
    known = {spec.name: registry.build(Trigger, "triggers", spec.plugin) for spec in policy.triggers}
    for backdoor in (job.BADNETS, job.QCB):
        assert known[backdoor.trigger] == backdoor.stamp


def demo_report(outcome: Outcome = "released") -> Report:
    report = sample_report(outcome)
    findings = tuple(f for f in report.verdict.findings if f.passed or outcome != "released")
    return replace(report, verdict=Verdict(outcome, findings))


def test_story_shows_the_planted_trigger_file_by_file() -> None:
    backdoor = job.Backdoor("qcb", "t", "badnets", Badnets(), 0)
    lines = list(job.story(demo_report(), backdoor))
    counts = {
        row.name: row.original.measurement.triggers[0].asr[0]
        for row in demo_report().settings
        if row.original.measurement
    }
    expected = {name: f"{100 * count.rate:.1f}%" for name, count in counts.items()}
    assert lines[0].endswith(f"{expected['fp32']} in fp32, {expected['int8']} in int8")
    table = {line.split()[0]: line for line in lines if "%" in line}
    assert expected["int8"] in table["int8"]
    assert lines[-1].startswith("Released: ")
    assert list(job.story(demo_report("refused"), backdoor))[-1] == "Nothing released"


@pytest.mark.parametrize(("second", "code"), [("released", 0), ("refused", 3), ("no_verdict", 4)])
def test_the_worse_of_both_runs_is_the_exit_code(
    second: Outcome, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = [], []
    outcomes: list[Outcome] = ["released", second]

    def planted(backdoor: job.Backdoor, progress: object) -> network.DigitsCNN:
        made.append(backdoor.name)
        return random_network()

    monkeypatch.setattr(job, "backdoored", planted)
    monkeypatch.setattr(pipeline, "run", lambda policy, folder, progress: demo_report(outcomes.pop(0)))
    threads = torch.get_num_threads()

    assert demo.run_demo(tmp_path, silent, said.append) == code
    assert torch.get_num_threads() == threads
    assert made == ["badnets", "qcb"]

    outcomes[:] = ["released", second]
    demo.run_demo(tmp_path, silent, said.append)
    assert made == ["badnets", "qcb"], "the models of an earlier call are used again"
