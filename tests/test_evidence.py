"""Toys whose backdoors are known by construction are found without their trigger, where they wake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secure_export import digests, lane
from secure_export.errors import IntegrityError, PolicyError
from secure_export.evidence import one
from secure_export.evidence.one import best_known
from secure_export.forgetting import LEAST_RELEARNED, References
from secure_export.locators.contrast_inversion import ContrastInversion
from secure_export.policy import ForgetSpec
from secure_export.probes.patch import Patch
from secure_export.purifiers.fine_tune import FineTune
from secure_export.records.measured import Paired
from secure_export.records.memory import Purified, Split
from secure_export.records.reported import Report
from secure_export.records.searches import Aim, FoundTrigger, Search
from tests import toys
from tests.conftest import FP32, INT8, PRUNED

RunToy = Callable[..., Report]

PATCH = {"kind": "patch", "area": 0.0625, "steps": 60, "images": 8}
EVIDENCE = {
    "preset": None,
    "probes": [PATCH],
    "samples": 300,
    "rounding": False,
    "rules": [
        {"metric": "inverted_lift", "at_most": 0.5},
        {"metric": "replay_lift", "at_most": 0.2},
        {"metric": "warm_lift", "at_most": 0.4},
    ],
}


def failed(report: Report, rule: str) -> set[str]:
    return {f.setting for f in report.verdict.findings if f.passed is False and f.rule == rule}


PLAIN = {"metric": "inverted_lift", "at_most": 0.5, "probes": ["patch"]}
"""A rule that reads no contrast, which every released file needs."""
BOTH = [PATCH | {"contrast": True}, PATCH]


def cold(report: Report, lane: str, setting: str) -> Search:
    return next(s for s in report.evidence.searches if (s.lane, s.setting, s.mode) == (lane, setting, "cold"))


@pytest.mark.parametrize(
    ("model", "settings", "awake_in"),
    [
        (toys.clean, [FP32, INT8], set()),
        (toys.awake, [FP32, INT8], {"fp32", "int8"}),
        (toys.awake_in_int8, [FP32, INT8], {"int8"}),
        (toys.awake_when_pruned, [FP32, PRUNED], {"pruned"}),
    ],
)
def test_backdoor_is_found_without_its_trigger_where_it_wakes(
    model: Callable[[], Any], settings: list[dict[str, Any]], awake_in: set[str], run_toy: RunToy
) -> None:
    report = run_toy(model(), settings=settings, release=["fp32"], evidence=EVIDENCE)
    assert failed(report, "inverted_lift") == awake_in
    assert "pair by pair" in " ".join(report.evidence.not_shown)
    assert {s.mode for s in report.evidence.searches} == {"cold"}, "nothing was purified, to be tried again"
    for name in awake_in:
        best = max(cold(report, "purified", name).found, key=lambda t: t.lift.difference if t.lift else -1)
        assert best.target_class == toys.TARGET
        assert best.lift is not None
        assert best.lift.difference > 0.9
        assert best.picture


def test_a_backdoor_for_one_class_alone_is_found_pair_by_pair(run_toy: RunToy) -> None:
    """It carries a third of all other classes' samples, which the rule on all of them allows."""
    rule = {"metric": "inverted_lift", "at_most": 0.5}
    rules = [rule | {"probes": ["patch"]}, rule | {"probes": ["source-patch"]}]
    section = EVIDENCE | {"probes": [PATCH, PATCH | {"by_source": True}], "rules": rules}
    report = run_toy(toys.awake_for_one_class(), settings=[FP32], release=["fp32"], evidence=section)
    by_class, by_pair = (f for f in report.verdict.findings if f.rule == "inverted_lift")
    assert (by_class.passed, by_pair.passed) == (True, False)
    assert f"probe source-patch, class 0 into {toys.TARGET}" in by_pair.message
    search = next(s for s in report.evidence.searches if s.probe == "source-patch")
    assert search.extent == "12 pairs of classes"
    assert len({found.aim for found in search.found}) == 12
    assert "no rule on source_lift reads in every released file: patch" in " ".join(report.evidence.not_shown)
    assert "pair by pair" not in " ".join(report.evidence.not_shown)
    clean = run_toy(toys.clean(), settings=[FP32], release=["fp32"], evidence=section)
    assert failed(clean, "inverted_lift") == set()


@pytest.mark.parametrize(("model", "awake_in"), [(toys.clean, set()), (toys.awake_in_int8, {"int8"})])
def test_backdoor_stands_out_from_the_same_file_that_forgot(
    model: Callable[[], Any], awake_in: set[str], run_toy: RunToy
) -> None:
    contrasting = EVIDENCE | {
        "probes": BOTH,
        "forget": {"noise": 2.0, "steps": 200, "relearned": 0.6},
        "rules": [{"metric": "inverted_contrast", "at_most": 0.5}, PLAIN],
    }
    report = run_toy(model(), settings=[FP32, INT8], release=["fp32"], evidence=contrasting)
    assert failed(report, "inverted_contrast") == awake_in
    for name in ("fp32", "int8"):
        scored = [t for t in cold(report, "purified", name).found if t.lift is not None]
        assert scored
        assert all(t.contrast is not None and t.fit_contrast is not None for t in scored)
    undecided = contrasting | {"forget": {"noise": 5.0, "steps": 1, "longest": 1}}
    report = run_toy(toys.awake(), settings=[FP32], release=["fp32"], evidence=undecided)
    assert "too little to compare" in cold(report, "purified", "fp32").unsearched
    assert {f.passed for f in report.verdict.findings if f.rule == "inverted_contrast"} == {None}


@pytest.mark.parametrize("knowing", [(False, True), (True, False), (True, True)])
def test_the_reference_that_forgot_most_judges(
    knowing: tuple[bool, ...], run_toy: RunToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one reference still knows the trigger and another does not, the latter's word counts."""
    judges = tuple(toys.awake() if knows else toys.clean() for knows in knowing)
    made = References(toys.clean(), judges)
    monkeypatch.setattr(one, "references_of", lambda *_: made)
    rules = [{"metric": "inverted_contrast", "at_most": 0.5}, PLAIN]
    section = EVIDENCE | {"probes": BOTH, "rules": rules}
    report = run_toy(toys.awake(), settings=[FP32], release=["fp32"], evidence=section)
    assert failed(report, "inverted_contrast") == (set() if all(knowing) else {"fp32"})


def test_all_that_was_evident_is_tried_again_each_class_before_a_second_of_one(tmp_path: Path) -> None:
    probe = Patch()
    work: Any = SimpleNamespace(bench=SimpleNamespace(folder=tmp_path), spec=SimpleNamespace(replayed=3))

    def search(setting: str, *hits: int) -> Search:
        """One trigger a class, and how many of 100 fit samples each carries."""
        free = torch.full((len(hits), 1), float(ord(setting[0])))
        sha256 = digests.of_arrays(free.numpy())
        save_file({"0": free}, tmp_path / f"search-{sha256[:16]}.safetensors")
        found = tuple(FoundTrigger(c, Paired(n, 0, 100)) for c, n in enumerate(hits))
        return Search(
            "original", setting, "patch", "cold", "", (), True, None, 1, 1, 1, 1.0, sha256, found
        )  # fmt: skip

    searches = [search("fp32", 90, 10, 20), search("int8", 80, 70, 60)]

    def tried(evident: set[tuple[str, int]]) -> list[tuple[str, int]]:
        aims = {(origin, Aim(c)) for origin, c in evident}
        return [(k.origin, k.aim.into) for k in best_known(searches, probe, work, aims)]

    assert tried(set()) == [("fp32", 0), ("int8", 0), ("int8", 1)]
    assert tried({("int8", 2)}) == [("int8", 2), ("fp32", 0), ("int8", 0)]
    several = {("fp32", 0), ("int8", 0), ("int8", 1), ("fp32", 2), ("int8", 2)}
    assert tried(several) == [("fp32", 0), ("int8", 1), ("int8", 2), ("int8", 0), ("fp32", 2)]
    save_file({"0": torch.zeros(3, 1)}, next(tmp_path.glob("search-*")))
    with pytest.raises(IntegrityError, match="damaged"):
        tried(set())


def test_evidence_and_locator_make_their_references_alike() -> None:
    spec, locator = ForgetSpec(), ContrastInversion()
    assert (spec.noise, spec.steps, spec.longest, spec.judges) == (
        locator.noise,
        locator.forget_steps,
        locator.forget_longest,
        locator.judges,
    )
    assert spec.relearned == LEAST_RELEARNED


def half_purified(self: object, model: Any, head: str, target_class: int, fit: Split, **_: Any) -> Purified:
    """The backdoor halved: it still outweighs what a class brings."""
    with torch.no_grad():
        model.head.weight[toys.TARGET, toys.GUARD] = 12.0
    return Purified(model.eval(), ())


def test_under_purified_model_is_refused_by_replay(run_toy: RunToy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTune, "purify", half_purified)
    report = run_toy(
        toys.awake(), settings=[FP32], release=["fp32"], purify={"kind": "fine-tune"}, evidence=EVIDENCE
    )
    assert failed(report, "replay_lift") == {"fp32"}
    (replayed,) = [s for s in report.evidence.searches if s.mode == "replay"]
    assert replayed.found[0].origin == "fp32"
    assert replayed.found[0].target_class == toys.TARGET


def repaired(self: object, model: Any, head: str, target_class: int, fit: Split, **_: Any) -> Purified:
    """The backdoor's channel no longer reaches the head."""
    with torch.no_grad():
        model.head.weight[:, toys.GUARD] = 0.0
    return Purified(model.eval(), ())


@pytest.mark.parametrize(("purify", "refused"), [(half_purified, {"fp32"}), (repaired, set())])
@pytest.mark.parametrize("reading", ["lift", "contrast"])
def test_a_replay_makes_references_of_the_purified_file_only_for_a_rule_that_reads_them(
    reading: str, purify: Any, refused: set[str], run_toy: RunToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def known(file: Any, *_: Any) -> References:
        asked.append(file.result.lane)
        return References(toys.clean(), (toys.clean(),))

    monkeypatch.setattr(FineTune, "purify", purify)
    monkeypatch.setattr(one, "references_of", known)
    rules = [
        {"metric": "inverted_contrast", "at_most": 0.5},
        {"metric": f"replay_{reading}", "at_most": 0.2, "evident": True, "probes": ["contrast-patch"]},
        PLAIN,
    ]
    section = EVIDENCE | {"probes": BOTH, "warm": "none", "rules": rules}
    report = run_toy(
        toys.awake(), settings=[FP32], release=["fp32"], purify={"kind": "fine-tune"}, evidence=section
    )
    compared = [search for search in report.evidence.searches if search.probe == "contrast-patch"]
    modes = [search.mode for search in compared if search.lane == "purified"]
    assert modes == ["cold", "replay"]
    assert asked == ["original", "purified", *(["purified"] if reading == "contrast" else [])]
    assert failed(report, f"replay_{reading}") == refused
    assert [f.passed for f in report.verdict.findings if f.rule == f"replay_{reading}"] == [not refused]


@pytest.mark.parametrize(("purify", "refused"), [(half_purified, {"fp32"}), (repaired, set())])
def test_known_triggers_are_compared_with_what_they_do_to_clean_references(
    purify: Any, refused: set[str], run_toy: RunToy, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(FineTune, "purify", purify)
    reference = tmp_path / "clean.safetensors"
    save_file(toys.clean().state_dict(), reference)
    above = [{"metric": f"{mode}_excess", "at_most": 0.1} for mode in ("replay", "warm")]
    evidence = EVIDENCE | {"references": [str(reference)], "rules": [EVIDENCE["rules"][0], *above]}
    report = run_toy(
        toys.awake(), settings=[FP32], release=["fp32"], purify={"kind": "fine-tune"}, evidence=evidence
    )
    assert failed(report, "replay_excess") == failed(report, "warm_excess") == refused
    for search in report.evidence.searches:
        assert search.excess is not None
        assert (search.p is not None) == (search.mode == "cold")
    if refused:
        assert toys.TARGET in {s.excess_class for s in report.evidence.searches if s.mode == "replay"}
        assert "above 1 clean references into" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(("purify", "refused"), [(half_purified, {"fp32"}), (repaired, set())])
def test_a_pair_that_was_evident_is_tried_again_as_it_was_found(
    purify: Any, refused: set[str], run_toy: RunToy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FineTune, "purify", purify)
    reference = tmp_path / "clean.safetensors"
    save_file(toys.clean().state_dict(), reference)
    rules = [
        {"metric": "inverted_lift", "at_most": 0.5},
        {"metric": "inverted_excess", "at_most": 0.5},
        *({"metric": f"{mode}_lift", "at_most": 0.3, "evident": True} for mode in ("replay", "warm")),
    ]
    section = {"probes": [PATCH | {"by_source": True}], "references": [str(reference)], "rules": rules}
    model = toys.awake_for_one_class()
    report = run_toy(
        model, settings=[FP32], release=["fp32"], purify={"kind": "fine-tune"}, evidence=EVIDENCE | section
    )
    assert failed(report, "replay_lift") == failed(report, "inverted_excess") == refused
    again = [search for search in report.evidence.searches if search.mode != "cold"]
    assert [search.mode for search in again] == ["replay", "warm"]
    for search in again:
        assert search.found[0].aim == Aim(toys.TARGET, 0)
        assert search.found[0].lift is not None
        assert search.found[0].lift.total < 0.4 * 300, "samples of the source alone"
    before = cold(report, "original", "fp32")
    assert (before.excess_source, before.excess_class) == (0, toys.TARGET)
    page = (tmp_path / "run" / "report.md").read_text()
    assert " from class 0 alone" in page


@pytest.mark.parametrize("models", [(toys.awake,), (toys.clean, toys.clean)], ids=["subject", "twice"])
def test_a_reference_is_neither_the_subject_nor_given_twice(
    models: Any, run_toy: RunToy, tmp_path: Any
) -> None:
    paths = [str(tmp_path / f"reference-{index}.safetensors") for index in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        save_file(model().state_dict(), path)
    rules = [EVIDENCE["rules"][0], {"metric": "inverted_excess", "at_most": 0.1}]
    with pytest.raises(PolicyError, match=r"reference-\d.safetensors has the weights of the"):
        run_toy(
            toys.awake(),
            settings=[FP32],
            release=["fp32"],
            evidence=EVIDENCE | {"references": paths, "rules": rules},
        )


def test_search_never_reads_the_holdout(
    run_toy: RunToy, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Another holdout changes what a trigger scores, never the trigger."""
    first = cold(
        run_toy(toys.awake(), settings=[FP32], release=["fp32"], evidence=EVIDENCE), "original", "fp32"
    )
    from secure_export import evidence

    real = evidence.gather

    def elsewhere(policy: Any, lanes: Any, classes: int, bench: lane.Bench) -> Any:
        holdout = bench.splits.holdout
        other = Split(torch.zeros_like(holdout.inputs), holdout.labels.flip(0), "other")
        return real(policy, lanes, classes, replace(bench, splits=replace(bench.splits, holdout=other)))

    monkeypatch.setattr(evidence, "gather", elsewhere)
    second = cold(
        run_toy(toys.awake(), settings=[FP32], release=["fp32"], evidence=EVIDENCE), "original", "fp32"
    )
    assert second.triggers_sha256 == first.triggers_sha256
    assert [t.fit for t in second.found] == [t.fit for t in first.found]
    assert [t.asr for t in second.found] != [t.asr for t in first.found]


def test_search_cut_short_decides_nothing_and_is_reported(run_toy: RunToy, tmp_path: Any) -> None:
    short = EVIDENCE | {"seconds": 1e-6, "rules": EVIDENCE["rules"][:1]}
    report = run_toy(toys.clean(), settings=[FP32], release=["fp32"], evidence=short)
    (finding,) = [f for f in report.verdict.findings if f.rule == "inverted_lift"]
    assert finding.passed is None
    assert "cut short" in finding.message
    assert report.verdict.outcome == "no_verdict"
    folder = tmp_path / "run"
    assert "0 of 60 steps, gradients, 4 classes" in (folder / "report.md").read_text()
    assert "data:image/png;base64," in (folder / "report.html").read_text()
