"""A ladder of purifiers: what is kept, what it may read, and how often one looks for a class again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save, save_file
from torch import nn

from secure_export import defence, pipeline
from secure_export.errors import PolicyError
from secure_export.lane import Bench
from secure_export.policy import Policy, judge, load_policy, parse_policy
from secure_export.purifiers.fine_tune import FineTune
from secure_export.purifiers.lmr import Lmr
from secure_export.records.measured import COLLAPSED, EXCESS, FIT_ACC, UNREAD, Suspect
from secure_export.records.memory import Purified, Split, Subject, silent
from secure_export.records.reported import Rung
from tests import judging, toys
from tests.conftest import FP32, toy_policy

SUSPECT = Suspect("latent-shift", "fp32", toys.TARGET, (0.0,) * toys.CLASSES)
Opened = tuple[Policy, Subject, Bench]


def _idle(_: Any, model: nn.Module, *__: Any, **___: Any) -> Purified:
    """A purifier that leaves the backdoor and says nothing of it."""
    return Purified(model.eval(), ())


@torch.no_grad()
def _thorough(_: Any, model: nn.Module, *__: Any, **___: Any) -> Purified:
    """One that cuts the planted neuron and leaves the rest."""
    model.head.weight[:, toys.GUARD] = 0
    return Purified(model.eval(), ())


@torch.no_grad()
def _ruinous(_: Any, model: nn.Module, *__: Any, **___: Any) -> Purified:
    """One that removes the backdoor with everything else."""
    model.head.weight.zero_()
    return Purified(model.eval(), ())


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Opened]:
    """A loaded job whose holdout and known trigger nobody can read."""

    def trap(_: Any) -> torch.Tensor:
        raise AssertionError("the known trigger was applied")

    def open_job(**changes: Any) -> Opened:
        checkpoint, path = tmp_path / "model.safetensors", tmp_path / "policy.yaml"
        save_file(toys.awake().state_dict(), checkpoint)
        path.write_text(yaml.safe_dump(toy_policy(settings=[FP32], release=["fp32"], **changes)))
        policy = load_policy(path, {"subject.model": str(checkpoint)})
        subject, splits = pipeline.load(policy, silent)
        bench = pipeline.open_bench(policy, tmp_path / "run", splits, silent)
        sealed = replace(splits, holdout=Split(None, None, "sealed"))  # type: ignore[arg-type]
        return policy, subject, replace(bench, splits=sealed, triggers=dict.fromkeys(bench.triggers, trap))

    return open_job


def test_keeps_the_first_that_holds_and_says_why_others_were_left(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _idle)
    monkeypatch.setattr(Lmr, "purify", _thorough)
    policy, subject, bench = opened(purify=["fine-tune", "lmr", {"kind": "lmr-plus", "rounds": 1}])
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert done.purification is not None
    assert done.purification.kind == "lmr"
    left, kept = done.purification.rungs
    assert (left.kind, left.kept, kept.kind, kept.kept) == ("fine-tune", False, "lmr", True)
    assert "lift" in left.broken[0]
    assert f"class {toys.TARGET}" in left.broken[0]
    assert kept.broken == ()


@pytest.mark.parametrize("spoilt", [save(toys.awake().state_dict()), b"no weights"], ids=["others", "none"])
def test_weights_that_others_laid_there_are_made_again(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch, spoilt: bytes
) -> None:
    """Purified weights are reused by their digest: the backdoored ones under their name are not."""
    monkeypatch.setattr(Lmr, "purify", _thorough)
    policy, subject, bench = opened(purify=["lmr"])
    first = defence.purify(policy, subject, [SUSPECT], bench)
    (path,) = bench.folder.glob("purified-*.safetensors")
    kept = path.read_bytes()
    path.write_bytes(spoilt)
    again = defence.purify(policy, subject, [SUSPECT], bench)
    assert again.identity == first.identity
    assert path.read_bytes() == kept
    assert not again.model.head.weight[:, toys.GUARD].any()
    monkeypatch.setattr(Lmr, "purify", _idle)
    assert defence.purify(policy, subject, [SUSPECT], bench).identity == first.identity


def test_keeps_the_least_faulty_where_none_holds(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _ruinous)
    monkeypatch.setattr(Lmr, "purify", _idle)
    rules = [
        {"metric": "acc_drop", "at_most": 0.02, "settings": "released"},
        {"metric": "top_share", "at_most": 0.5, "settings": "released"},
        {"metric": "lift", "at_most": 0.02, "settings": "all"},
    ]
    policy, subject, bench = opened(purify=["fine-tune", "lmr"], rules=rules)
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert done.purification is not None
    assert done.purification.kind == "lmr"
    assert [rung.kept for rung in done.purification.rungs] == [False, True]
    assert all(rung.broken for rung in done.purification.rungs)


def test_one_purifier_is_not_rehearsed(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _idle)
    policy, subject, bench = opened(purify={"kind": "fine-tune"})
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert done.purification is not None
    assert done.purification.rungs == ()


def _named_in_turn(monkeypatch: pytest.MonkeyPatch, *classes: int) -> None:
    answers = iter(classes)

    def locate(*_: Any) -> tuple[Suspect, ...]:
        return (replace(SUSPECT, target_class=next(answers, None)),)

    monkeypatch.setattr(defence, "locate", locate)


def test_looks_again_until_no_new_class_is_named(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _thorough)
    locate = toy_policy()["locate"] | {"rounds": 4}
    policy, subject, bench = opened(purify={"kind": "fine-tune"}, locate=locate)
    _named_in_turn(monkeypatch, 0, toys.TARGET)
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert done.purification is not None
    assert done.purification.target_classes == (0, toys.TARGET)
    assert done.suspects == ()


def test_a_class_that_the_last_round_names_stays_a_suspect(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _thorough)
    locate = toy_policy()["locate"] | {"rounds": 2}
    policy, subject, bench = opened(purify={"kind": "fine-tune"}, locate=locate)
    _named_in_turn(monkeypatch, 0, 1)
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert [(suspect.target_class, suspect.setting) for suspect in done.suspects] == [(1, "fp32, purified")]


@pytest.mark.parametrize(
    "evidence", [{UNREAD: "no twin"}, {COLLAPSED: True, FIT_ACC: 0.2, EXCESS: 0.6}], ids=["unread", "ruin"]
)
def test_a_locator_that_cannot_judge_the_purified_files_has_not_cleared_them(
    evidence: dict[str, Any], opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _thorough)
    locate = toy_policy()["locate"] | {"rounds": 2}
    policy, subject, bench = opened(purify={"kind": "fine-tune"}, locate=locate)
    silent = Suspect(SUSPECT.locator, "fp32", None, (), evidence)
    monkeypatch.setattr(defence, "locate", lambda *_: (silent,))
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert [(suspect.judged, suspect.setting) for suspect in done.suspects] == [(False, "fp32, purified")]
    plain = judging.make_report()
    report = replace(plain, suspects=(*plain.suspects, *done.suspects))
    assert (judge(judging.make_policy(), plain).outcome, judge(judging.make_policy(), report).outcome) == (
        "released",
        "no_verdict",
    )


@pytest.mark.parametrize(
    ("unconfirmed", "purified"), [("purify", (0, toys.TARGET)), ("accept", (toys.TARGET,))]
)
def test_what_only_another_locator_names_is_purified_where_the_policy_says_so(
    unconfirmed: str,
    purified: tuple[int, ...],
    opened: Callable[..., Opened],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FineTune, "purify", _thorough)
    locate = toy_policy()["locate"] | {"unconfirmed": unconfirmed}
    policy, subject, bench = opened(purify={"kind": "fine-tune"}, locate=locate)
    named = [SUSPECT, Suspect("anti-learning", "subject", 0, ())]
    done = defence.purify(policy, subject, named, bench)
    assert done.purification is not None
    assert done.purification.target_classes == purified


def test_later_rounds_do_not_hear_a_locator_that_always_names_a_class(
    opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "purify", _thorough)
    locate = toy_policy()["locate"] | {"unconfirmed": "purify", "rounds": 3}
    policy, subject, bench = opened(purify={"kind": "fine-tune"}, locate=locate)
    always = Suspect("anti-learning", "subject", 0, ())
    monkeypatch.setattr(defence, "locate", lambda *_: (always, SUSPECT))
    done = defence.purify(policy, subject, [SUSPECT], bench)
    assert done.purification is not None
    assert (done.purification.target_classes, done.suspects) == ((toys.TARGET,), ())


PRUNED = {
    "name": "pruned",
    "steps": [{"kind": "prune-structured", "ratio": 0.2, "recalibrate": False}, {"kind": "purify"}],
}


def test_a_pruned_network_is_purified_again_and_the_original_is_not(
    run_toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    treated = []

    @torch.no_grad()
    def nudged(_: Any, model: nn.Module, head: str, target: int, *__: Any, **___: Any) -> Purified:
        treated.append((target, sum(parameter.numel() for parameter in model.parameters())))
        model.head.weight[:, -1] += 0.01
        return Purified(model.eval(), ())

    monkeypatch.setattr(FineTune, "purify", nudged)
    report = run_toy(toys.awake(), purify={"kind": "fine-tune"}, settings=[FP32, PRUNED], release=["fp32"])
    (_, whole), (_, smaller) = treated
    assert {target for target, _ in treated} == {toys.TARGET}
    assert smaller < whole
    _, pruned = report.settings
    assert [change.kind for change in pruned.original.artifact.changes] == ["prune-structured"]
    assert [change.kind for change in pruned.purified.artifact.changes] == ["prune-structured", "purify"]
    assert not [f for f in report.verdict.findings if f.rule == "unchanged-step"]


def test_where_nothing_is_purified_nothing_is_purified_again(run_toy: Callable[..., Any]) -> None:
    report = run_toy(toys.clean(), purify={"kind": "fine-tune"}, settings=[FP32, PRUNED], release=["fp32"])
    _, pruned = report.settings
    assert report.purification is None
    assert [change.kind for change in pruned.purified.artifact.changes] == ["prune-structured"]
    assert not [f for f in report.verdict.findings if f.rule == "unchanged-step"]


def test_a_rung_may_be_a_name_and_must_be_something() -> None:
    policy = judging.make_policy(purify=["lmr", {"kind": "d3", "lam": 10.0}])
    assert policy.rungs == ({"kind": "lmr"}, {"kind": "d3", "lam": 10.0})
    assert judging.make_policy(purify=None).rungs == ()
    for wrong in ([], [3], [{"lam": 1}]):
        with pytest.raises(PolicyError, match="purify"):
            judging.make_policy(purify=wrong)


def test_a_wrong_rung_is_named_by_its_place() -> None:
    from secure_export.policy import check_plugins

    text = yaml.safe_dump(toy_policy(purify=[{"kind": "fine-tune"}, {"kind": "tune"}]), sort_keys=False)
    with pytest.raises(PolicyError, match=r"purify\.1\.kind: unknown purifier 'tune'"):
        check_plugins(parse_policy(text))


def test_the_report_says_which_were_tried() -> None:
    from secure_export.report import markdown

    rungs = (
        Rung("lmr", {}, (1,), False, ("fp32: lift .4 breaks at most .02",), 1.0),
        Rung("d3", {}, (1,), True, (), 1.0),
    )
    report = judging.make_report()
    assert report.purification is not None
    text = markdown.to_markdown(replace(report, purification=replace(report.purification, rungs=rungs)))
    assert "lmr against" in text
    assert "1 rule broken; fp32: lift .4 breaks at most .02" in text
    assert "d3 against" in text


ORACLES = {
    "a trigger": "from secure_export.triggers.badnets import Badnets",
    "the holdout": "from secure_export.data import split_data",
    "the measurement": "from secure_export import measure",
}


@pytest.mark.parametrize("what", ORACLES)
def test_an_oracle_purifier_is_refused(what: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(
        root / "secure_export", tmp_path / "secure_export", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(root / "pyproject.toml", tmp_path)
    oracle = tmp_path / "secure_export" / "purifiers" / "oracle.py"
    oracle.write_text(f'"""Looks at what it is judged by."""\n\n{ORACLES[what]}\n')
    linter = Path(sys.executable).with_name("lint-imports")
    command = [str(linter), "--contract", "no-peeking", "--no-cache"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "secure_export.purifiers.oracle" in found.stdout
