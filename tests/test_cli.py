"""The command line: what is parsed, what is printed, what it exits with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from secure_export import pipeline
from secure_export.cli import main
from secure_export.policy import Policy, load_policy
from secure_export.records.measured import Verdict
from secure_export.records.reported import Report
from secure_export.registry import FAMILIES, names
from secure_export.report.schema import load_report
from tests.conftest import loaded_by
from tests.report_sample import sample_report

POLICIES = Path(__file__).parents[1] / "policies"
COMMANDS = ("run", "judge", "verify", "validate", "list", "init", "demo", "report")


def invoke(*arguments: str, **env: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, env=env)
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_help_lists_every_command_and_exit_code() -> None:
    code, output = invoke("--help")
    assert code == 0
    for word in (*COMMANDS, "0 ", "1 ", "2 ", "3 ", "4 ", "130 "):
        assert word in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str) -> None:
    code, output = invoke(command, "--help")
    assert code == 0
    assert len(output.split("Options:")[0]) > 80


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "matplotlib", "scipy", "pydantic", "sklearn")
    assert loaded_by(arguments, heavy)[1] == []


def test_judge_needs_no_torch(tmp_path: Path) -> None:
    from secure_export.report.schema import dump_report

    (tmp_path / "report.json").write_text(dump_report(sample_report()), encoding="utf-8")
    judged = ["judge", str(tmp_path), "-p", str(POLICIES / "smoke.yaml")]
    code, loaded = loaded_by(judged, ("torch", "onnx", "onnxruntime"))
    assert loaded == []
    assert code in (3, 4)


@pytest.mark.parametrize(("outcome", "code"), [("released", 0), ("refused", 3), ("no_verdict", 4)])
def test_outcome_is_the_exit_code(
    outcome: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> Report:
        sample = sample_report()
        return dataclasses.replace(sample, verdict=Verdict(outcome, sample.verdict.findings))  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "run", measured)  # the gate itself: test_gate_bites, test_failures
    found, output = invoke("run", "-p", str(POLICIES / "smoke.yaml"), "--out", str(tmp_path), "-q", "--json")
    assert found == code
    data = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert data["outcome"] == outcome


def test_flag_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(policy: object, *_: object, **__: object) -> Report:
        seen.append(policy)
        return sample_report()

    monkeypatch.setattr(pipeline, "run", remember)
    arguments = ["run", "-p", str(POLICIES / "smoke.yaml"), "--out", str(tmp_path), "-q"]
    CliRunner().invoke(main, arguments, env={"SECURE_EXPORT_SEED": "7"})
    CliRunner().invoke(main, [*arguments, "--seed", "8"], env={"SECURE_EXPORT_SEED": "7"})
    CliRunner().invoke(main, [*arguments, "--mean", "0.5,0.4,0.3", "--std", "1,1,1", "--no-purify"])
    assert [policy.seed for policy in seen] == [7, 8, 0]
    assert seen[2].subject.mean == (0.5, 0.4, 0.3)
    assert seen[2].purify is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run"], "policy"),
        (["run", "-p", "no-such-policy"], "no-such-policy"),
        (["run", "-p", "smoke", "--mean", "a,b"], "--mean"),
        (["run", "-p", "smoke", "--resize", "32"], "resize"),
        (["run", "-p", "smoke"], "model"),
        (["list", "colours"], "colours"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_usage_errors_exit_2(arguments: list[str], word: str) -> None:
    code, output = invoke(*arguments)
    assert code == 2
    assert word in output


def test_init_writes_a_policy_that_validates_and_never_overwrites(tmp_path: Path) -> None:
    assert invoke("init", str(tmp_path))[0] == 0
    written = (tmp_path / "policy.yaml").read_text()
    assert load_policy(tmp_path / "policy.yaml").expanded_settings()
    code, output = invoke("init", str(tmp_path))
    assert code == 2
    assert "exists" in output
    assert (tmp_path / "policy.yaml").read_text() == written


@pytest.mark.parametrize(("name", "searched"), [("strict", False), ("smoke", False), ("blind", True)])
def test_validate_says_whether_triggers_are_searched(name: str, searched: bool) -> None:
    code, output = invoke("validate", "-p", name)
    assert code == 0, output
    assert ("every file is searched: patch, l2, warp" in output) == searched
    assert ("no file is searched" in output) != searched


def test_validate_names_a_missing_model() -> None:
    code, output = invoke("validate", "-p", "smoke", "--model", "nowhere.safetensors")
    assert code == 4
    assert "nowhere.safetensors" in output
    code, output = invoke("validate", "-p", "smoke", "--holdout-data", "nowhere")
    assert code == 4
    assert "holdout data" in output


def test_a_name_that_no_policy_has_is_told_which_ship() -> None:
    code, output = invoke("validate", "-p", "smok")
    assert code == 2
    assert "strict, balanced, blind, smoke" in output


@pytest.mark.parametrize("made", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_nothing_in_the_working_directory_stands_in_for_a_shipped_policy(
    made: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "strict")
    monkeypatch.chdir(tmp_path)
    code, output = invoke("validate", "-p", "strict")
    assert code == 0, output
    assert invoke("validate", "-p", "./strict")[0] == 2


def test_a_model_without_an_architecture_is_told_so(tmp_path: Path) -> None:
    code, output = invoke(
        "run", "-p", "smoke", "--model", "m.safetensors", "--out", str(tmp_path / "run"), "-q"
    )
    assert code == 2
    assert "m.safetensors needs an architecture" in output


def test_list_shows_every_plugin_with_a_summary() -> None:
    code, output = invoke("list", "--json")
    assert code == 0
    listed = json.loads(output)
    assert set(listed) == {"policy", *FAMILIES}
    for family in FAMILIES:
        assert sorted(listed[family]) == names(family)
        assert all(described["summary"] for described in listed[family].values())


def test_list_explains_every_key_of_a_policy() -> None:
    code, output = invoke("list", "policy", "--json")
    assert code == 0
    listed = json.loads(output)["policy"]
    assert {"policy", "data", "rules", "evidence", "evidence.rules"} <= set(listed)
    assert set(listed["policy"]["parameters"]) == set(Policy.model_fields)
    for part in listed.values():
        assert all(key["description"] for key in part["parameters"].values())


@pytest.mark.parametrize("schema", ["report", "policy"])
def test_list_publishes_the_schemas(schema: str) -> None:
    code, output = invoke("list", "--schema", schema)
    assert code == 0
    assert "properties" in output
    assert json.loads(output)


def test_report_draws_again_what_was_stored(tmp_path: Path) -> None:
    from secure_export.report.schema import dump_report

    (tmp_path / "report.json").write_text(dump_report(sample_report()), encoding="utf-8")
    code, output = invoke("report", str(tmp_path), "--format", "html", "-o", str(tmp_path / "again.html"))
    assert code == 0, output
    assert (tmp_path / "again.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert "#" in invoke("report", str(tmp_path), "--format", "markdown")[1]
    assert load_report(tmp_path / "report.json") == sample_report()


def test_report_of_a_folder_without_one(tmp_path: Path) -> None:
    code, output = invoke("report", str(tmp_path))
    assert code == 2
    assert "report.json" in output
