"""The attack lab: every attack runs, resumes and stores what it made, on handwritten digits."""

from __future__ import annotations

import dataclasses
import io
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cards, datasets, entries, lab, networks, sources, zoo, zoo_table
from benchmarks.attacks._poison import Poison
from secure_export import heads
from secure_export.errors import DataError, PolicyError

FEW = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of tiny images cost more to share between threads than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short(recipe: Any) -> Any:
    """The recipe with a few steps in every stage."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = short(value)
        elif field.name in ("steps", "joint", "settle", "epochs", "rounds") or field.name.endswith("_steps"):
            changes[field.name] = min(value, 1 if field.name in ("rounds", "epochs") else FEW)
        elif field.name in ("images", "batch_size"):
            changes[field.name] = 40
    return dataclasses.replace(recipe, **changes)


@pytest.fixture(scope="module")
def data() -> datasets.Images:
    return datasets.digits()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry with a short recipe."""
    for name, entry in entries.ZOO.items():
        changes = {"recipe": short(entry.recipe)}
        if entry.trigger_recipe is not None:
            changes["trigger_recipe"] = short(entry.trigger_recipe)
        monkeypatch.setitem(entries.ZOO, name, dataclasses.replace(entry, **changes))


@pytest.fixture
def bench(data: datasets.Images, tmp_path: Path) -> lab.Lab:
    """A folder with an untrained network under every name that attacks start from."""
    made = lab.Lab(tmp_path, data, "resnet18_w8")
    for entry in entries.ZOO.values():
        lab.store(made.untrained(), made.path(entry.base))
    return made


@pytest.mark.parametrize("name", [name for name in entries.ZOO if name != "clean"])
@pytest.mark.usefixtures("quick")
def test_attack_changes_the_network_and_applies_a_stored_trigger(name: str, bench: lab.Lab) -> None:
    before = bench.untrained().state_dict()
    model, seconds = lab.trained(name, bench)
    after = model.state_dict()
    assert seconds > 0
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    x = datasets.to_unit(bench.data.test_x[:8])
    triggered = bench.trigger(name)(x)
    assert triggered.shape == x.shape
    assert float((triggered - x).abs().max()) > 0
    assert 0 <= float(triggered.min()) <= float(triggered.max()) <= 1


def test_card_is_confirmed_and_a_changed_file_is_not(bench: lab.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    short_card = dataclasses.replace(entries.ZOO["badnets"], settings=("fp32",), recipe=short(Poison()))
    monkeypatch.setitem(entries.ZOO, "badnets", short_card)
    lab.make("badnets", bench)
    content, path = cards.read(bench.out / "badnets.json"), bench.path("badnets")
    again = lab.measure("badnets", bench.load("badnets"), bench)
    assert cards.differences(content, path, again) == []
    model = bench.load("badnets")
    with torch.no_grad():
        next(iter(model.parameters())).mul_(-1)
    lab.store(model, path)
    found = cards.differences(content, path, lab.measure("badnets", bench.load("badnets"), bench))
    assert any("not the file" in line for line in found)
    assert any(line.startswith("fp32 acc") for line in found)


@pytest.mark.parametrize(
    ("asr", "ftr", "expected"),
    [(99, 1, "awake"), (99, 98, "asleep"), (4, 1, "asleep"), (50, 1, "half"), (92, 3, "half")],
)
def test_table_calls_awake_what_the_trigger_did(asr: int, ftr: int, expected: str) -> None:
    assert zoo_table.state({"acc": [90, 100], "asr": [asr, 100], "ftr": [ftr, 100]}) == expected


def test_table_calls_a_file_that_knows_nothing_a_ruin() -> None:
    assert zoo_table.state({"acc": [10, 100], "asr": [100, 100], "ftr": [100, 100]}) == "ruin"


@pytest.mark.parametrize("name", ["vgg16", "mobilenetv2", "vit_small", "resnet18_w8"])
def test_network_gives_logits_of_small_images_and_has_a_head(name: str) -> None:
    if name in ("mobilenetv2", "vit_small"):
        pytest.importorskip("timm")
    model = networks.named(name, classes=7).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert heads.find(model, (3, 32, 32))[1] == 7


def test_a_model_waits_for_what_it_is_made_from() -> None:
    assert zoo.made_from("clean") == set()
    assert zoo.made_from("lf") == {"clean"}
    assert zoo.made_from("qcb-d") == {"badnets", "clean"}


def test_unknown_model_and_network_are_usage_errors() -> None:
    with pytest.raises(PolicyError, match="no network"):
        networks.named("resnet19")
    with pytest.raises(PolicyError, match="no model"):
        zoo.check_names(("badnet",))


def test_folder_of_pictures_becomes_shuffled_arrays(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for label, level in (("cat", 10), ("dog", 200)):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (40, 30), (level, level, level))
                picture.save(tmp_path / "pets" / split / label / f"{number}.png")
    found = sources.named("folder", tmp_path / "cache", tmp_path / "pets")
    assert found.classes == ("cat", "dog")
    assert found.train_x.shape == (12, 3, 32, 32)
    assert torch.equal((found.train_x[:, 0, 0, 0] > 100).long(), found.train_y)
    assert found.train_y[:6].unique().numel() == 2
    with pytest.raises(DataError, match="no train"):
        sources.named("folder", tmp_path / "other", tmp_path / "cache")


def test_recordings_become_signals_around_silence(tmp_path: Path) -> None:
    def recording(samples: int) -> bytes:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as out:
            out.setparams((1, 2, 8000, samples, "NONE", ""))
            out.writeframes(np.full(samples, 1000, dtype="<i2").tobytes())
        return buffer.getvalue()

    with tarfile.open(tmp_path / sources.SPEECH, "w:xz") as files:
        for name in ("7_ann_0", "7_ann_9", "3_ann_8", "3_ann_1"):
            content = recording(3000)
            member = tarfile.TarInfo(f"recordings/{name}.wav")
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))
    found = sources.named("fsdd", tmp_path / "cache", tmp_path)
    assert (found.train_x.shape, found.test_x.shape) == ((2, 1, 1, 8192), (2, 1, 1, 8192))
    assert found.train_x[0, 0, 0, 0] == 255
    assert found.train_x[0, 0, 0, 3000] == 128
    logits = networks.named("keywords", 2).eval()(datasets.normalize(datasets.to_unit(found.test_x)))
    assert logits.shape == (2, 2)
