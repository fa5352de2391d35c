"""Every probe keeps its budget on inputs of any shape, and finds planted triggers."""

from __future__ import annotations

import pytest
import torch

from secure_export import registry, searching
from secure_export.counting import counted, judged_on
from secure_export.errors import CompressError
from secure_export.measure import logits_of
from secure_export.perturbations import as_samples
from secure_export.probes import Logits, Probe
from secure_export.probes.filter import Filter
from secure_export.probes.l2 import L2
from secure_export.probes.linf import Linf
from secure_export.probes.patch import Patch
from secure_export.probes.warp import Warp
from secure_export.probes.wave import Wave
from secure_export.records.memory import Split
from secure_export.records.searches import Aim, aims
from secure_export.searching import Finds, queried, search
from secure_export.triggers import Trigger
from tests import toys

KINDS = registry.names("probes")
SHAPES = [(3, 20, 32), (1, 8, 8), (2, 60), (50,)]


def probe(kind: str) -> Probe:
    return registry.build(Probe, "probes", {"kind": kind})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_whatever_is_searched_stays_within_the_budget(
    kind: str, shape: tuple[int, ...], scale: float
) -> None:
    size, generator = torch.Size(shape), torch.Generator().manual_seed(0)
    found = probe(kind)
    free = [scale * variable for variable in found.begin(size, 3, generator)]
    free = found.proposed(free, 0.3, generator)
    made = found.perturbation(free, size)
    inputs = torch.rand(6, *shape, generator=generator)
    stamped = made.stamp(inputs, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert stamped.shape == inputs.shape
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert len(made) == 3
    assert found.budget(size)
    change = made.add.flatten(1)
    if isinstance(found, Patch):
        covered = (1 - made.keep).flatten(1).sum(1)
        assert (covered <= max(4.0, found.area * made.keep[0].numel()) + 1e-3).all()
    elif isinstance(found, L2):
        assert torch.allclose(change.norm(dim=1), torch.tensor(0.018 * size.numel() ** 0.5))
    elif isinstance(found, Linf):
        assert change.abs().max() <= 8 / 255
    elif isinstance(found, Warp):
        assert made.flow is not None
        assert made.flow.abs().max() <= 2 * 0.047 + 1e-6
    else:
        most = 0.1 if isinstance(found, Filter | Wave) else 0.06
        assert (stamped - inputs).abs().max() <= most + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_finds_the_same_and_fit_is_not_touched(kind: str) -> None:
    fit, model = toy_split(), toys.awake()
    before = fit.inputs.clone()
    quick = probe(kind).model_copy(update={"steps": 3, "images": 4})
    first, second = (search(model, fit, quick, into(0, 2), seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.free, second.free, strict=True))
    assert torch.equal(fit.inputs, before)
    judged = judged_on(fit, torch.Generator().manual_seed(0))
    assert 0 < first.forwards - 3 * 2 * 2 * 4 - len(judged) <= 2 * len(judged)


def toy_split() -> Split:
    inputs, labels = toys.samples(200)
    return Split(torch.tensor(inputs), torch.tensor(labels), "toy")


def into(*classes: int) -> list[Aim]:
    return [Aim(c) for c in classes]


def lift(found: Finds, target_class: int) -> float:
    return found.lift[found.aims.index(Aim(target_class))].difference


def test_query_search_finds_a_patch_without_gradients() -> None:
    model = toys.awake()

    def file(inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs).detach()

    quick = Patch(area=0.0625, queries=120, images=8)
    found = queried(file, toy_split(), quick, into(*range(toys.CLASSES)), seed=0)
    assert lift(found, toys.TARGET) > 0.9
    assert max(lift(found, c) for c in range(toys.CLASSES) if c != toys.TARGET) < 0.5
    clean = queried(toys.clean(), toy_split(), quick, into(*range(toys.CLASSES)), seed=0)
    assert max(part.difference for part in clean.lift) < 0.5


@pytest.mark.parametrize("gradient", [True, False])
def test_a_trigger_of_one_source_is_searched_and_counted_on_it_alone(gradient: bool) -> None:
    model, fit = toys.awake_for_one_class(), toy_split()
    probe = Patch(area=0.0625, steps=60, queries=150, images=8, by_source=True)
    aims = probe.aims(toys.CLASSES)
    found = search(model, fit, probe, aims, seed=0) if gradient else queried(model, fit, probe, aims, seed=0)
    reached = {aim: lift.difference for aim, lift in zip(found.aims, found.lift, strict=True)}
    assert reached.pop(Aim(toys.TARGET, 0)) > 0.9
    assert max(reached.values()) < 0.5
    assert {lift.total for aim, lift in zip(aims, found.lift, strict=True) if aim.source == 0} == {
        int((fit.labels == 0).sum())
    }
    few = Split(fit.inputs[fit.labels != 3], fit.labels[fit.labels != 3], "")
    with pytest.raises(CompressError, match="no sample of class 3"):
        search(model, few, probe, [Aim(0, 3)], seed=0)


def test_pairs_that_fill_several_batches_are_searched_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit, model = toy_split(), toys.awake_for_one_class()
    probe = Patch(area=0.0625, steps=60, images=8, by_source=True)
    monkeypatch.setattr(searching, "MOST_ROWS", 5 * probe.images)
    found = search(model, fit, probe, probe.aims(toys.CLASSES), seed=0)
    assert found.aims == probe.aims(toys.CLASSES)
    assert (found.ended, len(found.free[0])) == (12, 12)
    assert found.lift[found.aims.index(Aim(toys.TARGET, 0))].difference > 0.9


def test_candidates_are_tried_on_the_samples_of_each_source() -> None:
    """Stripes name class 1 where the image is dark; class 2 is bright, and never carried."""
    inputs = torch.cat([torch.full((20, 1, 16, 16), level) for level in (0.4, 0.4, 0.8)])
    labels = torch.arange(3).repeat_interleave(20)

    def logits(images: torch.Tensor) -> torch.Tensor:
        told, bright = striped(1)(images)[:, 1], 1000 * (images.mean((1, 2, 3)) - 0.6)
        return torch.stack([torch.zeros_like(told), told, bright], dim=1)

    probe = Wave(steps=1, lr=1e-6, starts=2, scan=100, images=6, by_source=True)
    found = search(logits, Split(inputs, labels, ""), probe, probe.aims(3), seed=0)
    reached = {aim: lift.difference for aim, lift in zip(found.aims, found.lift, strict=True)}
    assert reached[Aim(1, 0)] > 0.9
    assert reached[Aim(1, 2)] < 0.1


def signal_with_a_backdoor() -> Logits:
    """Two classes by the mean of a signal's halves; a spike train at samples 20..23 names class 1."""

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        spikes = torch.relu(inputs[:, 0, 20:24].sum(1) - 0.5)
        return torch.stack([inputs[:, 0, 24:].mean(1), inputs[:, 0, :20].mean(1) + 2 * spikes], dim=1)

    return logits


def test_what_a_judge_says_is_counted() -> None:
    """The twin obeys the stripes; the file beside it never does."""
    inputs, labels = torch.full((40, 1, 16, 16), 0.5), torch.zeros(40, dtype=torch.long)
    fit, twin = Split(inputs, labels, ""), striped(1)

    def file(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    probe = Wave(steps=1, lr=1e-6, starts=2, scan=100, images=6, contrast=True)
    by_twin = search(twin, fit, probe, into(1), seed=0, against=file)
    by_file = search(twin, fit, probe, into(1), seed=0, against=file, judge=file)
    assert by_twin.lift[0].difference > 0.9
    assert by_file.lift[0].difference == 0


def test_patch_is_found_in_a_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 0.3 * torch.rand(120, 1, 44, generator=generator)
    labels = torch.arange(120) % 2
    inputs[labels == 0, :, 24:] += 0.5
    inputs[labels == 1, :, :20] += 0.5
    fit = Split(inputs, labels, "signal")
    found = search(signal_with_a_backdoor(), fit, Patch(area=0.1, steps=80, images=16), into(0, 1), seed=0)
    assert lift(found, 1) > 0.8
    assert lift(found, 0) < 0.5


WAVE = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16)


def striped(*axes: int) -> Logits:
    """Class 1 when three periods run along one of the axes (1: rows, 2: columns) of an image."""

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        told = torch.stack([100 * inputs[:, 0].mean(3 - axis) @ WAVE - 10 for axis in axes]).amax(0)
        return torch.stack([torch.zeros_like(told), told], dim=1)

    return logits


@pytest.mark.parametrize("scan", [0, 100])
def test_scanned_waves_are_where_a_search_begins(scan: int) -> None:
    fit = Split(torch.full((40, 1, 16, 16), 0.5), torch.zeros(40, dtype=torch.int64), "gray")
    step = Wave(steps=1, lr=1e-6, starts=2, scan=scan)
    found = search(striped(1), fit, step, into(0, 1), seed=0)
    assert (lift(found, 1) > 0.9) == (scan > 0)
    assert found.forwards - scan_forwards(step) == 2 * 2 * 6 * 2 + 40 * 3
    against = search(striped(1, 2), fit, step, into(0, 1), seed=0, against=striped(1))
    made = step.perturbation(against.free, torch.Size((1, 16, 16)))
    (_, (_, avoided)), (_, (_, here)) = (
        counted(model, fit, made, into(0, 1)) for model in (striped(1), striped(1, 2))
    )
    assert avoided.difference < 0.1
    assert (here.difference > 0.9) == (scan > 0)


def scan_forwards(wave: Wave) -> int:
    candidates = wave.candidates(torch.Size((1, 16, 16)))
    return 0 if candidates is None else len(candidates[0]) * wave.images


def test_a_search_works_against_another_model() -> None:
    """Both models answer to the first half of a signal, one also to the second: that one is looked for."""

    def of_halves(*halves: slice) -> Logits:
        def logits(inputs: torch.Tensor) -> torch.Tensor:
            bright = torch.stack([inputs[:, half].mean(1) for half in halves]).amax(0)
            return torch.stack([torch.full_like(bright, 0.5), bright], 1) * 8

        return logits

    first, second = slice(0, 8), slice(8, 16)
    fit = Split(torch.full((40, 16), 0.4), torch.zeros(40, dtype=torch.int64), "")
    probe = L2(rms=0.15, steps=60)
    found = search(of_halves(first, second), fit, probe, into(1), seed=0, against=of_halves(first))
    made = probe.perturbation(found.free, torch.Size([16]))
    (_, here), (_, there) = (
        counted(logits, fit, made, into(1))[0] for logits in (of_halves(first, second), of_halves(first))
    )
    assert (here.difference, there.difference) == (1.0, 0.0)


def test_filter_that_swaps_channels_is_found() -> None:
    """Class 1 is named where the second channel repeats a little of the first, whatever the picture."""

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        likeness = (inputs[:, 1] - 0.02 * inputs[:, 0]).flatten(1).mean(1) * 200
        return torch.stack([2 + 0 * likeness, likeness], dim=1)

    inputs = torch.rand(120, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 1] = 0
    fit = Split(inputs, torch.zeros(120, dtype=torch.long), "colours")
    assert lift(search(logits, fit, Filter(steps=60), into(0, 1), seed=0), 1) > 0.9


def test_warm_search_goes_on_from_its_start() -> None:
    fit, quick = toy_split(), Patch(area=0.0625, steps=60, images=8)
    found = search(toys.awake(), fit, quick, into(toys.TARGET), seed=0)
    assert lift(found, toys.TARGET) > 0.9
    short = quick.model_copy(update={"steps": 1})
    warm = search(toys.awake(), fit, short, into(toys.TARGET), seed=1, start=found.free)
    cold = search(toys.awake(), fit, short, into(toys.TARGET), seed=1)
    assert lift(warm, toys.TARGET) > 0.9 > 0.5 > lift(cold, toys.TARGET)


def test_only_those_that_lead_somewhere_go_on_after_a_third_of_the_steps() -> None:
    fit, classes = toy_split(), into(*range(toys.CLASSES))
    whole = Patch(area=0.0625, steps=60, images=8)
    short = whole.model_copy(update={"finalists": 1 / toys.CLASSES})
    found = search(toys.awake(), fit, short, classes, seed=0)
    assert lift(found, toys.TARGET) > 0.9
    judging = 100 + sum(paired.total for paired in found.lift)
    assert found.steps == 60
    assert found.forwards - judging == 2 * 8 * (20 * toys.CLASSES + 40)
    assert found.ended == 1
    early = search(toys.awake(), fit, whole.model_copy(update={"steps": 20}), classes, seed=0)
    others = [c for c in range(toys.CLASSES) if c != toys.TARGET]
    assert all(torch.equal(found.free[0][c], early.free[0][c]) for c in others)
    assert not torch.equal(found.free[0][toys.TARGET], early.free[0][toys.TARGET])


def test_no_class_is_dropped_before_a_step_was_taken() -> None:
    """With two steps a third of them is none, and which class leads would be chance."""
    hasty = Patch(area=0.0625, steps=2, images=8, finalists=0.4)
    found = search(toys.awake(), toy_split(), hasty, into(*range(toys.CLASSES)), seed=0)
    untouched = hasty.begin(
        torch.Size(toy_split().inputs.shape[1:]), toys.CLASSES, torch.Generator().manual_seed(0)
    )
    moved = [not torch.equal(a, b) for a, b in zip(found.free[0], untouched[0], strict=True)]
    assert all(moved)


def test_wave_finds_stripes() -> None:
    """Class 1 is named where the picture carries six periods from left to right."""
    stripes = torch.sin(2 * torch.pi * 6 * torch.arange(32) / 32)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        seen = (inputs * stripes).mean((1, 2, 3)) / 0.025
        return torch.stack([torch.ones(len(inputs)), seen**2], dim=1)

    inputs = 0.2 + 0.6 * torch.rand(120, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fit = Split(inputs, torch.zeros(120, dtype=torch.long), "grey")
    assert lift(search(logits, fit, Wave(steps=60), into(0, 1), seed=0), 1) > 0.9
    assert lift(search(logits, fit, Wave(steps=60, fastest=0.1), into(0, 1), seed=0), 1) < 0.1


@pytest.mark.parametrize("shape", [(3, 20, 32), (2, 7, 9), (2, 60), (50,)], ids=str)
def test_one_wave_alone_reaches_the_whole_amplitude(shape: tuple[int, ...]) -> None:
    found, size = Wave(amplitude=0.1), torch.Size(shape)
    share, turn = found.begin(size, 1, torch.Generator().manual_seed(0))
    share[0, 1], turn[:] = 50.0, torch.tensor([1.0, 0.0])
    change = found.perturbation([share, turn], size).add
    assert change.max() == pytest.approx(0.1, rel=1e-4)
    assert change.abs().max() <= 0.1 + 1e-6


def test_a_patch_on_a_tiny_image_has_room_for_four_pixels_and_for_six_in_contrast() -> None:
    shape = torch.Size((3, 8, 8))
    assert [Patch(contrast=contrast).budget(shape) for contrast in (False, True)] == [
        "mask of 4.0 of 64 positions",
        "mask of 6.0 of 64 positions",
    ]
    evenly = [torch.zeros(1, 64), torch.zeros(1, *shape)]
    assert (1 - Patch(contrast=True).perturbation(evenly, shape).keep).sum().item() == pytest.approx(6)


def awake_on_bytes(inputs: torch.Tensor) -> torch.Tensor:
    """Class 1 for what is bright in the first place, where every value is one that a byte can have."""
    steps = 255 * inputs.flatten(1)
    off = (steps - steps.round().detach()).abs().amax(1)
    bright = 8 * (inputs.flatten(1)[:, 0] - 0.6) - 1e4 * off.clamp(min=1e-3)
    return torch.stack([torch.zeros(len(inputs)), bright + 10], 1)


def test_what_wakes_on_bytes_alone_is_searched_on_bytes() -> None:
    """A file can tell values that no image has, and sleep there: in search, scoring and measuring."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 120, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(40, dtype=torch.int64)
    found = search(awake_on_bytes, Split(inputs, labels, ""), Patch(area=0.0625), into(1), seed=0)
    assert found.lift[0].gained == 40
    made = Patch(area=0.0625).perturbation(found.free, inputs.shape[1:])
    as_floats = Split(inputs.float() / 255, labels, "")
    assert counted(awake_on_bytes, as_floats, made, into(1))[0][1].gained == 0
    trigger = registry.build(Trigger, "triggers", {"kind": "blended", "alpha": 0.9, "seed": 1})
    assert bool(logits_of(awake_on_bytes, Split(inputs, labels, ""), trigger).isfinite().all())
    blended = as_samples(trigger(as_floats.inputs), Split(inputs, labels, ""))
    assert torch.equal(blended, (255 * blended).round() / 255)


def test_a_search_that_meets_a_gradient_without_a_number_shows_nothing() -> None:
    """Its triggers would be no numbers either, and what they carry would count as nothing found."""

    def moated(inputs: torch.Tensor) -> torch.Tensor:
        light = inputs.flatten(1).sum(1)
        return torch.stack([light, (0 * light).sqrt()], 1)

    fit = Split(torch.rand(20, 1, 4, 4), torch.arange(20) % 2, "fit")
    with pytest.raises(CompressError, match="not finite"):
        search(moated, fit, Patch(steps=3), aims(2), seed=0)
