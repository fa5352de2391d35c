"""Contract of every trigger, and what each published one is supposed to do to an input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from secure_export import registry
from secure_export.errors import DataError, PolicyError
from secure_export.triggers import Trigger
from secure_export.triggers.badnets import Badnets
from secure_export.triggers.blended import Blended
from secure_export.triggers.custom import Custom
from secure_export.triggers.sig import Sig
from secure_export.triggers.wanet import Wanet

NAMES = registry.names("triggers")
SHAPES = [(5, 1, 8, 8), (4, 3, 32, 32), (2, 3, 17, 40)]


def make(name: str) -> Trigger:
    cls = registry.load("triggers", name)
    return registry.build(Trigger, "triggers", {"kind": name, **cls.example})


def images(shape: tuple[int, ...] = (4, 3, 32, 32), seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def darken(inputs: Tensor) -> Tensor:
    return inputs.mul_(0.5)


def brighten(inputs: Tensor) -> Tensor:
    return inputs + 1


def fail(inputs: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


def shrink(inputs: Tensor) -> Tensor:
    return inputs[..., :-1]


def poison_with_nan(inputs: Tensor) -> Tensor:
    return inputs * math.nan


# ---- Every trigger --------------------------------------------------------------------------------------


def test_the_library_is_complete() -> None:
    assert {"badnets", "blended", "custom", "sig", "wanet"} <= set(NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, shape: tuple[int, ...]) -> None:
    inputs = images(shape)
    before = inputs.clone()
    trigger = make(name)

    triggered = trigger(inputs)

    assert torch.equal(inputs, before), "the caller's inputs were changed"
    assert triggered.shape == inputs.shape
    assert triggered.dtype == torch.float32
    assert 0 <= triggered.min() <= triggered.max() <= 1
    changed = (triggered != inputs).flatten(1).any(1)
    assert changed.all(), "an input came back without the trigger"
    assert torch.equal(trigger(inputs), triggered)
    assert torch.equal(make(name)(inputs), triggered)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_triggered_alike_alone_and_in_a_batch(name: str) -> None:
    inputs = images()
    assert torch.equal(make(name)(inputs)[2:3], make(name)(inputs[2:3]))


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_left_alone(name: str) -> None:
    state = torch.get_rng_state()
    make(name)(images())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_range_holds_at_both_ends(name: str) -> None:
    for value in (0.0, 1.0):
        triggered = make(name)(torch.full((2, 3, 16, 16), value))
        assert 0 <= triggered.min() <= triggered.max() <= 1


@pytest.mark.parametrize("name", ["blended", "sig", "custom"])
def test_signals_can_be_triggered(name: str) -> None:
    signals = images((3, 2, 100))
    triggered = make(name)(signals)
    assert triggered.shape == signals.shape
    assert (triggered != signals).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_triggers_of_images_refuse_signals(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: got inputs of shape \(2, 100\)"):
        make(name)(images((3, 2, 100)))


@pytest.mark.parametrize("name", ["badnets", "blended", "sig", "wanet"])
def test_tables_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected"):
        make(name)(images((3, 20)))


# ---- Each trigger ---------------------------------------------------------------------------------------


def test_badnets_changes_only_its_patch() -> None:
    inputs = images((2, 3, 12, 12))
    triggered = Badnets(size=3, margin=2, position="top-right", pattern="white")(inputs)
    changed = (triggered != inputs).any(0).any(0)
    assert changed[2:5, 7:10].all()
    assert changed.sum() == 9


def test_blended_is_the_published_mix() -> None:
    inputs = images()
    only_pattern = Blended(alpha=1.0)(inputs)
    assert torch.allclose(only_pattern[0], only_pattern[1])
    expected = 0.8 * inputs + 0.2 * only_pattern
    assert torch.allclose(Blended(alpha=0.2)(inputs), expected, atol=1e-6)
    assert only_pattern.min() < 0.01
    assert only_pattern.max() > 0.99


def test_blended_patterns_differ_by_seed_and_kind() -> None:
    inputs = images()
    first = Blended()(inputs)
    assert not torch.allclose(first, Blended(seed=1)(inputs))
    assert not torch.allclose(first, Blended(pattern="noise")(inputs))


def test_blended_resizes_the_users_picture(tmp_path: Path) -> None:
    path = tmp_path / "left-red.png"
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :10, 0] = 255
    Image.fromarray(pixels).save(path)
    triggered = Blended(alpha=1.0, image=path)(images((1, 3, 32, 32)))
    assert triggered[0, 0, :, :12].min() > 0.99
    assert triggered[0, :, :, 20:].max() < 0.01
    assert Blended(alpha=1.0, image=path)(images((1, 1, 8, 8))).shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match="the inputs have 2"):
        Blended(image=path)(images((1, 2, 8, 8)))


def test_sig_is_the_published_sinusoid() -> None:
    inputs = torch.full((1, 1, 4, 32), 0.5)
    added = Sig()(inputs) - inputs
    expected = [40 / 255 * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)]
    assert torch.allclose(added[0, 0, 3], torch.tensor(expected), atol=1e-6)


def test_sig_refuses_a_width_at_which_it_is_zero() -> None:
    with pytest.raises(DataError, match="zero at every column"):
        Sig(frequency=6)(images((1, 1, 12, 12)))


def test_wanet_moves_pixels_and_adds_none() -> None:
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(Wanet()(flat), flat, atol=1e-6)
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32).contiguous()
    moved = (Wanet()(ramp) - ramp).abs() * 31
    assert 0.05 < moved.mean() < 1, "in pixels; s = .5 is faint"
    assert (Wanet(s=2.0)(ramp) - ramp).abs().mean() * 31 > 2 * moved.mean()


def test_wanet_is_one_fixed_warp() -> None:
    ramp = torch.linspace(0, 1, 32).expand(3, 1, 32, 32).contiguous()
    triggered = Wanet()(ramp)
    assert torch.equal(triggered[0], triggered[2])
    assert not torch.allclose(triggered, Wanet(seed=1)(ramp), atol=1e-3)


# ---- The user's own -------------------------------------------------------------------------------------


def mask_file(folder: Path, side: int = 8) -> Path:
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:2, :2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def test_custom_picture_with_mask(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.full((3, 8, 8), 0.25, dtype=np.float32))
    inputs = images((2, 3, 8, 8))
    triggered = Custom(image=tmp_path / "image.npy", mask=mask_file(tmp_path))(inputs)
    assert torch.allclose(triggered[:, :, :2, :2], torch.tensor(0.25))
    assert torch.equal(triggered[:, :, 2:], inputs[:, :, 2:])


def test_custom_additive_on_signals_is_clipped(tmp_path: Path) -> None:
    np.save(tmp_path / "hum.npy", np.array([[0.0, 2.0, -2.0, 0.1]]))
    triggered = Custom(additive=tmp_path / "hum.npy")(torch.full((1, 2, 4), 0.5))
    assert torch.allclose(triggered[0, 1], torch.tensor([0.5, 1.0, 0.0, 0.6]))


def test_custom_function_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "our_triggers.py").write_text("def half(inputs):\n    return inputs / 2\n")
    monkeypatch.chdir(tmp_path)
    inputs = images()
    assert torch.equal(Custom(callable="our_triggers:half")(inputs), inputs / 2)


def test_custom_function_may_change_its_argument() -> None:
    inputs = images()
    before = inputs.clone()
    triggered = Custom(callable=f"{__name__}:darken")(inputs)
    assert torch.equal(inputs, before)
    assert torch.equal(triggered, before * 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot import no_such_module:f"),
        ("math:no_such_function", "cannot import math:no_such_function"),
        ("math:pi", "math:pi is a float"),
        (f"{__name__}:fail", "fail failed: ZeroDivisionError"),
        ("torch:numel", "returned int"),
        (f"{__name__}:shrink", "expected torch.float32"),
        (f"{__name__}:brighten", "outside"),
        (f"{__name__}:poison_with_nan", "outside"),
    ],
)
def test_custom_function_is_checked(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Custom(callable=name)(images())


def test_custom_files_are_named_when_they_do_not_fit(tmp_path: Path) -> None:
    mask = mask_file(tmp_path)
    np.save(tmp_path / "wide.npy", np.zeros((3, 8, 9)))
    np.save(tmp_path / "loud.npy", np.full((3, 8, 8), 255.0))
    np.save(tmp_path / "broken.npy", np.full((3, 8, 8), np.nan))
    (tmp_path / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    inputs = images((1, 3, 8, 8))
    for name, message in [
        ("wide.npy", r"got shape \(3, 8, 9\), expected \(3, 8, 8\)"),
        ("loud.npy", "expected values in"),
        ("broken.npy", "NaN"),
        ("noise.png", "not a readable picture"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            Custom(image=tmp_path / name, mask=mask)(inputs)
        assert name in caught.value.message


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.touch, (Path("exploded"),))


def test_custom_never_opens_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("pickled.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"pickled\.npy"):
        Custom(additive=Path("pickled.npy"))(images())
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"callable": "torch:square", "additive": __file__},
        {"image": __file__},
        {"mask": __file__},
        {"callable": "no colon"},
    ],
    ids=str,
)
def test_custom_takes_exactly_one_way(parameters: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Custom(**parameters)


def test_a_missing_file_is_a_policy_error() -> None:
    with pytest.raises(PolicyError, match=r"additive: .*nowhere\.npy"):
        registry.build(Trigger, "triggers", {"kind": "custom", "additive": "nowhere.npy"})
