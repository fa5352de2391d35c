"""Every locator keeps its contract; latent shift solves its programme and names no class without reason."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from secure_export import registry, views
from secure_export.defence import disagreements
from secure_export.errors import CompressError, NoVerdict
from secure_export.forgetting import References
from secure_export.locators import Locator
from secure_export.locators.anti_learning import AntiLearning
from secure_export.locators.contrast_inversion import ContrastInversion, _Compared
from secure_export.locators.latent_shift import LatentShift, least_distance, shift_norms
from secure_export.locators.max_margin import MaxMargin, outlier_p
from secure_export.policy import Setting
from secure_export.probes.patch import Patch
from secure_export.records.measured import ALWAYS_NAMES, UNREAD, Disagreement, Suspect
from secure_export.records.memory import Split, View, silent
from tests import digits, toys

KINDS = registry.names("locators")


@cache
def model(poisoned: bool, head: str = "linear") -> digits.Digits:
    return digits.trained(poisoned, head=head)


def located(kind: str, poisoned: bool, head: str = "linear") -> Suspect:
    locator = registry.build(Locator, "locators", {"kind": kind})
    view = views.of_module(model(poisoned, head), digits.HEAD, "original")
    return locator.locate(view, digits.fit_split(), seed=0)


def view_of(weight: torch.Tensor, latents: torch.Tensor) -> View:
    return View("original", lambda inputs: latents[: len(inputs)], weight, torch.zeros(len(weight)))


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_the_target_of_a_strong_backdoor(kind: str, head: str) -> None:
    suspect = located(kind, True, head)
    assert int(np.argmax(suspect.scores)) == digits.TARGET
    if (kind, head) == ("max-margin", "conv"):
        # A known miss: p = .062 stays above the threshold of .05.
        pytest.xfail("the largest margin is the target's, but not named")
    assert suspect.target_class == digits.TARGET


def test_max_margin_names_an_outlier_and_nothing_else() -> None:
    alike = [8.0, 8.1, 7.9, 8.3, 7.7, 8.0, 8.2, 7.8, 8.1]
    assert outlier_p([*alike, 14.0]) < 0.05
    assert outlier_p([*alike, 8.4]) > 0.05
    assert outlier_p([1.0, 2.0]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_score_a_class_and_json_evidence(kind: str) -> None:
    suspect = located(kind, False)
    assert (suspect.locator, suspect.setting, len(suspect.scores)) == (kind, "original", digits.CLASSES)
    assert all(type(value) in (bool, int, float, str) for value in suspect.evidence.values())
    assert suspect == located(kind, False), "the same seed gives the same answer"


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_model_and_global_stream_alone(kind: str) -> None:
    before = {name: value.clone() for name, value in model(True).state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    located(kind, True)
    assert torch.equal(torch.rand(1), expected)
    assert not model(True).training
    assert all(torch.equal(value, before[name]) for name, value in model(True).state_dict().items())


@pytest.mark.parametrize("kind", ["latent-shift", "trigger-inversion", "contrast-inversion"])
def test_names_nothing_on_a_clean_model(kind: str) -> None:
    suspect = located(kind, False)
    assert suspect.target_class is None
    assert suspect.evidence["collapsed"] is False


@pytest.mark.parametrize("kind", ["trigger-inversion", "contrast-inversion"])
def test_inversion_names_no_class_of_a_ruin_and_needs_gradients(kind: str) -> None:
    locator = registry.build(Locator, "locators", {"kind": kind})
    view = views.of_module(model(True), digits.HEAD, "original")
    fit = digits.fit_split()
    ruined = replace(fit, labels=(fit.labels + 1) % digits.CLASSES)
    suspect = locator.locate(view, ruined, seed=0)
    assert (suspect.target_class, suspect.evidence["collapsed"]) == (None, True)
    with pytest.raises(CompressError, match="no differentiable twin"):
        locator.locate(replace(view, twin=None), fit, seed=0)


@pytest.mark.parametrize("knowing", [(False, True), (True, False), (True, True)])
def test_the_reference_that_obeys_least_tells_the_contrast(knowing: tuple[bool, ...]) -> None:
    judges = tuple(toys.awake() if knows else toys.clean() for knows in knowing)
    inputs, labels = toys.samples(200)
    split = Split(torch.tensor(inputs), torch.tensor(labels), "toy")
    compared = _Compared(toys.awake(), References(toys.clean(), judges), split, split)
    probe = Patch(area=0.0625, steps=60, images=8)
    scores = compared.contrasts(probe, toys.CLASSES, 0, silent)
    assert (scores[toys.TARGET] > 0.9) == (not all(knowing))
    assert max(score for c, score in enumerate(scores) if c != toys.TARGET) < 0.5


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"patch": {3: 0.45}, "large-patch": {3: 0.5, 7: 0.6}}, 3),
        ({"large-patch": {7: 0.6}}, None),
        ({"large-patch": {7: 0.75}, "wave": {2: 0.3}}, 7),
        ({"l2": {4: 0.39}, "wave": {4: 0.41}}, 4),
        ({"l2": dict.fromkeys(range(10), 0.5)}, None),
    ],
)
def test_families_of_triggers_have_limits_of_their_own(
    found: dict[str, dict[int, float]], named: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a large patch does to clean networks would be a backdoor for a small one."""
    by_family = {family: [some.get(c, 0.05) for c in range(digits.CLASSES)] for family, some in found.items()}
    monkeypatch.setattr(ContrastInversion, "searched", lambda *_: by_family)
    suspect = located("contrast-inversion", False)
    assert suspect.target_class == named
    assert (max(suspect.scores) >= suspect.evidence["min_score"]) == (named is not None or "l2" in found)


def test_patch_that_is_large_on_a_small_image_has_the_limit_of_large_ones() -> None:
    evidence = located("contrast-inversion", False).evidence
    assert "contrast_large-patch" in evidence
    assert "contrast_patch" not in evidence


def test_contrast_inversion_compares_with_no_ruin() -> None:
    view = views.of_module(model(True), digits.HEAD, "original")
    locator = registry.build(
        Locator,
        "locators",
        {"kind": "contrast-inversion", "noise": 9, "forget_steps": 1, "forget_longest": 1},
    )
    with pytest.raises(CompressError, match="too little to compare"):
        locator.locate(view, digits.fit_split(), seed=0)


def test_latent_shift_says_collapsed_instead_of_naming_a_class() -> None:
    """One class takes nearly all samples, which also makes the way into it short."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    latents = torch.nn.functional.one_hot(labels, 10).float() + 0.1 * torch.rand(300, 10, generator=generator)
    latents[:, 4] += 1.2
    suspect = LatentShift().locate(
        view_of(torch.eye(10) * 8, latents), Split(torch.zeros(300, 1), labels, ""), seed=0
    )
    assert suspect.evidence["smallest"] == 4
    assert suspect.evidence["collapsed"] is True
    assert suspect.target_class is None


def test_latent_shift_names_nothing_with_three_classes() -> None:
    labels = torch.arange(90) % 3
    latents = torch.nn.functional.one_hot(labels, 3).float()
    weight = torch.eye(3)
    weight[1] *= 4
    latents[labels != 1, 1] = -0.1
    suspect = LatentShift(min_score=0.01, min_gap=0.01).locate(
        view_of(weight, latents), Split(torch.zeros(90, 1), labels, ""), seed=0
    )
    assert "fewer than 4 classes" in str(suspect.evidence[UNREAD]), "no word that counts"
    assert suspect.target_class is None


def test_least_distance_agrees_with_a_general_solver() -> None:
    from scipy.optimize import minimize

    generator = np.random.default_rng(0)
    for width in (4, 30):
        rows, wanted = generator.normal(size=(6, width)), generator.normal(size=6) + 1
        solved = minimize(
            lambda s: s @ s,
            np.ones(width),
            jac=lambda s: 2 * s,
            constraints={
                "type": "ineq",
                "fun": lambda s, a=rows, b=wanted: a @ s - b,
                "jac": lambda s, a=rows: a,
            },
        )
        expected = np.sqrt(solved.fun) if solved.success else np.inf
        assert least_distance(rows, wanted) == pytest.approx(expected, rel=1e-4)


def test_least_distance_knows_no_way_and_no_need() -> None:
    assert least_distance(np.array([[1.0], [-1.0]]), np.array([1.0, 1.0])) == np.inf
    assert least_distance(np.array([[1.0], [2.0]]), np.array([-1.0, 0.0])) == 0


def test_shift_norms_leave_the_class_itself_out_and_forgive_outliers() -> None:
    labels = np.arange(400) % 4
    logits = np.eye(4)[labels] * 2
    norms = shift_norms(np.eye(4), logits, labels, 0.95)
    assert norms == pytest.approx(np.full(4, norms[0]))
    logits[1] *= 100
    assert shift_norms(np.eye(4), logits, labels, 0.95) == pytest.approx(norms)
    assert shift_norms(np.eye(4), logits, labels, 1.0).max() > 10 * norms.max()


def test_anti_learning_needs_a_module() -> None:
    view = view_of(torch.eye(10), torch.zeros(300, 10))
    with pytest.raises(NoVerdict, match="trainable"):
        AntiLearning().locate(view, digits.fit_split(), seed=0)


def test_anti_learning_tells_how_little_its_name_means() -> None:
    evidence = located("anti-learning", False).evidence
    assert evidence["always_names_a_class"] is True
    assert {"lead", "agreement"} <= set(evidence)


def test_latent_shift_does_not_judge_a_half_collapsed_model() -> None:
    """A clean network with a fifth of its channels masked: accuracy .6, one class 16 points too frequent."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    latents = torch.nn.functional.one_hot(labels, 10).float() + 0.1 * torch.rand(300, 10, generator=generator)
    latents[torch.rand(300, generator=generator) < 0.2, 4] += 1.2
    suspect = LatentShift().locate(
        view_of(torch.eye(10) * 8, latents), Split(torch.zeros(300, 1), labels, ""), seed=0
    )
    assert 0.1 < float(suspect.evidence["excess"]) < 0.4
    assert suspect.evidence["collapsed"] is True
    assert suspect.target_class is None


def test_max_margin_says_when_a_file_gives_no_gradient() -> None:
    with pytest.raises(CompressError, match="no differentiable twin"):
        MaxMargin().locate(view_of(torch.eye(10), torch.zeros(300, 10)), digits.fit_split(), seed=0)


def said(locator: str, setting: str, target_class: int | None, **evidence: bool | str) -> Suspect:
    return Suspect(locator, setting, target_class, () if UNREAD in evidence else (0.0, 1.0), evidence)


def test_disagreement_is_told_by_file_and_only_among_those_that_could_be_silent() -> None:
    settings = (Setting("fp32", (), {}, True), Setting("int8", ({"kind": "x"},), {}, True))
    anything = said("anti-learning", "subject", 3, **{ALWAYS_NAMES: True})
    quiet = [said("latent-shift", "fp32", None), said("max-margin", "fp32", None)]
    assert disagreements([anything, *quiet], settings) == (), "a name for every model disputes no silence"
    found = disagreements([anything, said("latent-shift", "fp32", 1)], settings)
    assert found == (Disagreement("fp32", {"anti-learning": 3, "latent-shift": 1}),)
    found = disagreements(
        [*quiet, said("latent-shift", "int8", 1), said("max-margin", "int8", None)], settings
    )
    assert found == (Disagreement("int8", {"latent-shift": 1, "max-margin": None}),)
    unread = said("max-margin", "int8", None, **{UNREAD: "no twin"})
    assert disagreements([said("latent-shift", "int8", 1), unread], settings) == ()
