"""Policy files: what they become, and where and why they are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from pydantic import Field

from secure_export import compressors, registry, triggers
from secure_export.errors import PolicyError
from secure_export.policy import check_plugins, load_policy, parse_policy

CORPUS = Path(__file__).parent / "policies"
VALID = sorted((CORPUS / "valid").glob("*.yaml"))
INVALID = sorted((CORPUS / "invalid").glob("*.yaml"))
SHIPPED = sorted((Path(__file__).parent.parent / "policies").glob("*.yaml"))
MINIMAL = (CORPUS / "valid" / "minimal.yaml").read_text()


def ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_the_corpus_is_there() -> None:
    assert len(VALID) >= 2
    assert len(INVALID) >= 60
    assert {"balanced", "smoke", "strict"} <= set(ids(SHIPPED))


@pytest.mark.parametrize("path", INVALID, ids=ids(INVALID))
def test_invalid_policy_says_what_is_wrong_where(path: Path) -> None:
    text = path.read_text()
    expected = [line[2:] for line in text.splitlines() if line.startswith(f"# {path.name}:")]
    with pytest.raises(PolicyError) as refused:
        parse_policy(text, path.name)
    assert refused.value.message.split("\n") == expected
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("path", [*VALID, *SHIPPED], ids=ids([*VALID, *SHIPPED]))
def test_valid_policy_loads_and_is_frozen(path: Path) -> None:
    policy = load_policy(path)
    assert policy.text == path.read_text()
    assert policy.path == str(path)
    assert policy == load_policy(str(path))
    assert len(policy.sha256) == 64
    with pytest.raises(ValueError, match="frozen"):
        policy.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=ids(SHIPPED))
def test_shipped_policy_gives_a_reason_for_every_limit(path: Path) -> None:
    assert all(rule.reason for rule in load_policy(path).rules)


def test_every_value_arrives() -> None:
    policy = load_policy(CORPUS / "valid" / "everything.yaml")
    assert policy.subject.std == (0.25, 1.0, 0.25)
    assert (policy.data.resize, policy.data.channels, policy.data.holdout) == ((32, 48), None, 1000)
    assert policy.purify == {"kind": "lmr", "lr": 0.001}
    assert [trigger.name for trigger in policy.triggers] == ["badnets", "large"]
    assert policy.triggers[1].plugin == {"kind": "badnets", "size": 5}
    assert [rule.limit for rule in policy.rules] == [0.5, 0, 0.5, 0.05, 0.1, 0.9, 10, 0.9]


def test_sweeps_become_a_cartesian_product_of_settings() -> None:
    settings = {s.name: s for s in load_policy(CORPUS / "valid" / "everything.yaml").expanded_settings()}
    assert list(settings) == [
        "fp32",
        "int8@true@minmax",
        "int8@true@entropy",
        "int8@false@minmax",
        "int8@false@entropy",
        "prune@0.2",
        "prune@0.5",
    ]
    assert [name for name, s in settings.items() if s.released] == [
        "fp32",
        "int8@true@minmax",
        "int8@false@minmax",
    ]
    assert settings["prune@0.5"].steps == ({"kind": "prune-structured", "ratio": 0.5}, {"kind": "recover"})
    assert settings["prune@0.5"].format == {"kind": "onnx"}


@pytest.mark.timeout(30)
def test_sweeps_that_never_end_are_refused() -> None:
    swept = ", ".join(f"p{i}: {{sweep: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}" for i in range(9))
    text = MINIMAL.replace("steps: []", f"steps: [{{kind: ort-static-int8, {swept}}}]")
    assert text != MINIMAL
    with pytest.raises(PolicyError, match="settings: sweeps make 1000000000 settings, expected at most 1000"):
        parse_policy(text)


@pytest.mark.parametrize(
    "override", [{"seed": 2**63}, {"seed": 2**64}, {"subject.classes": 10**6 + 1}, {"data.fit": 2**53}]
)
def test_numbers_that_nothing_can_hold_are_refused(override: dict[str, Any]) -> None:
    (key,) = override
    with pytest.raises(PolicyError, match=rf"{key}: Input should be less than"):
        parse_policy(MINIMAL, "p.yaml", override)


def test_defaults_are_the_strict_ones() -> None:
    policy = parse_policy(MINIMAL)
    assert policy.locate.unconfirmed == "refuse"
    assert (policy.confidence, policy.seed) == (0.95, 0)
    assert all((rule.settings, rule.classes, rule.triggers) == ("all", "all", "all") for rule in policy.rules)


def test_overrides_win_over_the_file() -> None:
    changes: dict[str, Any] = {
        "subject.model": Path("m.safetensors"),
        "data.fit": 20,
        "purify": {"kind": "lmr"},
        "seed": 3,
    }
    policy = parse_policy(MINIMAL, overrides=changes)
    assert (policy.subject.model, policy.data.fit, policy.seed) == ("m.safetensors", 20, 3)
    assert parse_policy(MINIMAL, overrides=changes | {"purify": None}).purify is None
    assert policy.text == MINIMAL


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"data.fit": 0},
            "command line or environment: data.fit: Input should be greater than or equal to 1, got 0",
        ),
        ({"data.resize": [0, 3]}, "command line or environment: data.resize.0: "),
        ({"data.fits": 3}, "command line or environment: data.fits: unknown key, did you mean 'fit'?"),
        ({"model": "m"}, "command line or environment: model: unknown key, did you mean 'subject.model'?"),
        (
            {"version.number": 3},
            "command line or environment: version.number: version is no mapping in p.yaml",
        ),
        ({"release": ["int8"]}, "command line or environment: release.0: 'int8' matches no setting (fp32)"),
    ],
)
def test_wrong_override_is_blamed_on_the_command_line(override: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(MINIMAL, "p.yaml", override)
    assert refused.value.message.startswith(message)


def test_order_of_keys_does_not_matter_and_json_is_a_policy() -> None:
    plain = pyyaml.safe_load(MINIMAL)
    backwards = dict(reversed(plain.items()))
    assert parse_policy(json.dumps(backwards)).model_dump() == parse_policy(MINIMAL).model_dump()


def test_words_that_only_look_like_values_stay_words() -> None:
    text = MINIMAL.replace(
        "{kind: badnets}", "{kind: badnets, a: no, b: 010, c: 2026-01-01, d: 1_0, e: ~, f: 1e2, g: -3}"
    )
    parameters = {k: v for k, v in parse_policy(text).triggers[0].plugin.items() if k != "kind"}
    assert parameters == {"a": "no", "b": 10, "c": "2026-01-01", "d": "1_0", "e": None, "f": 100.0, "g": -3}


def test_unreadable_files_are_policy_errors(tmp_path: Path) -> None:
    cases = {"latin.yaml": "reason: é".encode("latin-1"), "huge.yaml": b"# " + b"x" * 1_000_001}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name, message in {
        "latin.yaml": "no UTF-8 text (byte 8)",
        "huge.yaml": "1000003 bytes are no policy",
        "missing.yaml": "cannot be read: No such file or directory",
        "": "cannot be read: Is a directory",
    }.items():
        with pytest.raises(PolicyError, match=message.replace("(", r"\(").replace(")", r"\)")):
            load_policy(tmp_path / name)


def test_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_policy(path).model_dump() == parse_policy(MINIMAL).model_dump()


# ---- Plug-ins ------------------------------------------------------------------------------------------

PLUGINS = """\
version: 1
locate: {methods: [{kind: latent-shift}], decisive: [latent-shift]}
purify: {kind: fine-tune}
settings:
  - {name: fp32, steps: []}
  - {name: int8, steps: [{kind: ort-static-int8, samples: {sweep: [100, 200]}}]}
release: [fp32]
triggers:
  - {kind: badnets, size: 3}
rules:
  - {metric: acc, at_least: 0.9}
  - {metric: asr, at_most: 0.05}
"""


def test_plugins_that_can_be_built_pass() -> None:
    check_plugins(parse_policy(PLUGINS))
    check_plugins(parse_policy(PLUGINS, overrides={"purify": None}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "size: 3",
            "size: 0",
            "p.yaml:9:27: triggers.0.size: Input should be greater than or equal to 1, got 0",
        ),
        ("size: 3", "sise: 3", "p.yaml:9:21: triggers.0.sise: unknown key, did you mean 'size'?"),
        (
            "badnets",
            "badnet",
            "p.yaml:9:12: triggers.0.kind: unknown trigger 'badnet' (did you mean 'badnets'? ",
        ),
        ("fine-tune", "tune", "p.yaml:3:16: purify.kind: unknown purifier 'tune'"),
        ("latent-shift}", "latent-shift, quantile: 2}", "p.yaml:2:51: locate.methods.0.quantile: "),
        ("200]", "0]", "p.yaml:6:73: settings.1.steps.0.samples.sweep.1: Input should be greater"),
        (
            "samples: {",
            "sampels: {",
            "p.yaml:6:50: settings.1.steps.0.sampels: unknown key, did you mean 'samples'?",
        ),
        (
            "steps: []",
            "steps: [], format: {kind: onx}",
            "p.yaml:5:44: settings.0.format.kind: unknown format 'onx'",
        ),
    ],
)
def test_plugin_that_cannot_be_built_is_named_with_its_place(old: str, new: str, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        check_plugins(parse_policy(PLUGINS.replace(old, new, 1), "p.yaml"))
    assert refused.value.message.startswith(message)


def test_all_plugin_errors_come_at_once() -> None:
    text = PLUGINS.replace("size: 3", "size: 0").replace("fine-tune", "tune").replace("[100, 200]", "[0, -1]")
    with pytest.raises(PolicyError) as refused:
        check_plugins(parse_policy(text))
    assert [line.split(": ")[1] for line in refused.value.message.split("\n")] == [
        "purify.kind",
        "settings.1.steps.0.samples.sweep.0",
        "settings.1.steps.0.samples.sweep.1",
        "triggers.0.size",
    ]


def test_module_step_after_a_file_step_and_missing_libraries_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnModule(compressors.ModuleStep):
        level: int = Field(1, description="none")

        def on_module(self, model: Any, context: Any) -> Any:
            raise NotImplementedError

    class NoTrigger(registry.Plugin):
        pass

    load = registry.load

    def fake(family: str, name: str) -> type[registry.Plugin]:
        if name == "absent":
            raise ImportError("No module named 'absent'")
        return {"on-module": OnModule, "no-trigger": NoTrigger}.get(name) or load(family, name)

    monkeypatch.setattr(registry, "load", fake)
    text = PLUGINS.replace("sweep: [100, 200]}}", "sweep: [100, 200]}}, {kind: on-module}")
    with pytest.raises(
        PolicyError, match=r"policy:6:81: settings\.1\.steps\.1: .* put it before the steps on the file"
    ):
        check_plugins(parse_policy(text))
    with pytest.raises(
        PolicyError, match=r"triggers\.0\.kind: absent needs a library that is not there: No module"
    ):
        check_plugins(parse_policy(PLUGINS.replace("badnets", "absent")))
    with pytest.raises(PolicyError, match=r"triggers\.0\.kind: NoTrigger is not a Trigger"):
        check_plugins(parse_policy(PLUGINS.replace("badnets", "no-trigger")))
    assert issubclass(load("triggers", "badnets"), triggers.Trigger)


def test_policies_are_read_and_judged_without_torch() -> None:
    code = (
        "import sys, secure_export.policy as p, secure_export.report.schema, secure_export.statistics as s;"
        f"p.load_policy({str(SHIPPED[0])!r}).expanded_settings(); s.upper(0, 100, .05);"
        "heavy = {'torch', 'onnx', 'onnxruntime'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
