"""Clean samples: three sources, what is refused, and splits that share no sample."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secure_export import sources
from secure_export.data import check_labels, make_splits, split_data
from secure_export.errors import DataError
from secure_export.records.memory import Split, Splits
from secure_export.sources import Samples, load_samples

NAMES = ("ant", "bee", "cat")


def picture(seed: int, size: tuple[int, int] = (6, 8), channels: int = 3) -> Image.Image:
    """A random image of (height, width)."""
    shape = (*size, 3) if channels == 3 else size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def folder_of(root: Path, per_class: int = 6, start: int = 0) -> Path:
    for label, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for k in range(per_class):
            picture(start + 1000 * label + k).save(root / name / f"{k:03}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "data")


def split(source: Path | str, **changes: Any) -> Splits:
    options = {"fit": 6, "calibration": 6, "holdout": None, "seed": 0} | changes
    return split_data(str(source), **options)


def rows(part: Split) -> set[bytes]:
    return {row.numpy().tobytes() for row in part.inputs}


def random_samples(counts: list[int], seed: int = 0) -> Samples:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    generator = torch.Generator().manual_seed(seed)
    return Samples(torch.rand(len(labels), 1, 4, 4, generator=generator), labels, None)


def as_source() -> Any:
    samples = random_samples([9, 9])
    return samples.inputs, samples.labels


def named_source() -> Any:
    samples = random_samples([9, 9])
    return samples.inputs.double().numpy(), samples.labels.int(), ["no", "yes"]


def not_samples() -> Any:
    return 3


# ---- Sources --------------------------------------------------------------------------------------------


def test_a_folder_gives_raw_pixels_in_the_order_of_its_names(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    samples = load_samples(str(folder), progress=lambda *call: calls.append(call))
    assert samples.inputs.dtype == torch.uint8
    assert samples.inputs.shape == (18, 3, 6, 8)
    assert samples.class_names == NAMES
    assert samples.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert np.array_equal(samples.inputs[7].permute(1, 2, 0), np.asarray(picture(1001)))
    assert calls == [("reading data", 18, 18)]


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 6, 8)), (3, (3, 6, 8)), (None, (1, 6, 8))])
def test_channels_are_as_asked(channels: int | None, shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture(0, channels=1).save(tmp_path / "a" / "grey.png")
    assert load_samples(str(tmp_path), channels=channels).inputs.shape[1:] == shape


def test_resize_is_height_by_width(folder: Path) -> None:
    picture(99, (20, 30)).save(folder / "ant" / "large.png")
    assert load_samples(str(folder), resize=(4, 5)).inputs.shape[1:] == (3, 4, 5)


def test_npz_that_unpacks_to_far_more_than_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, inputs=np.zeros((2000, 1, 30, 30), np.uint8), labels=np.arange(2000) % 2)
    assert len(load_samples(str(file)).labels) == 2000
    monkeypatch.setattr(sources, "UNPACKED", 1_000_000)
    with pytest.raises(DataError, match="unpacks to"):
        load_samples(str(file))


def test_npz_and_factories_give_the_same(tmp_path: Path) -> None:
    samples = random_samples([9, 9])
    np.savez(tmp_path / "d.npz", inputs=samples.inputs, labels=samples.labels, class_names=["no", "yes"])
    from_npz, named = (
        load_samples(str(tmp_path / "d.npz")),
        load_samples("tests.test_data:named_source"),
    )
    plain = load_samples("tests.test_data:as_source")
    for other in (named, plain):
        assert torch.equal(from_npz.inputs, other.inputs)
        assert torch.equal(from_npz.labels, other.labels)
    assert from_npz.class_names == named.class_names == ("no", "yes")
    assert plain.class_names is None
    assert split("tests.test_data:as_source").class_names == ("0", "1")


TWO = {"inputs": np.zeros((2, 2)), "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(4, int)}, "holds no array 'inputs'"),
        (
            {"inputs": np.full((4, 2), 2.0), "labels": np.zeros(4, int)},
            r"range from 2 to 2, expected \[0, 1\]",
        ),
        ({"inputs": np.full((4, 2), np.nan), "labels": np.zeros(4, int)}, "NaN or infinity"),
        ({"inputs": np.zeros((4, 2), np.int64), "labels": np.zeros(4, int)}, "inputs are int64"),
        ({"inputs": np.zeros((4, 2)), "labels": np.zeros(4)}, "labels are float64, expected integers"),
        ({"inputs": np.zeros((4, 2)), "labels": np.array([0, 1, 2, -1])}, "labels from -1 to 2"),
        ({"inputs": np.zeros((4, 2)), "labels": np.zeros(3, int)}, r"shape \[4, 2\] and labels \[3\]"),
        ({"inputs": np.zeros((0, 2)), "labels": np.zeros(0, int)}, "at least one sample"),
        ({"inputs": np.zeros(4), "labels": np.zeros(4, int)}, "expected"),
        ({"inputs": np.array([{}] * 4), "labels": np.zeros(4, int)}, "Object arrays cannot be loaded"),
        (
            {"inputs": np.zeros((2, 2)), "labels": np.array([0, 5]), "class_names": ["a", "b"]},
            r"2 class names \(a, b\) do not name labels 0..5",
        ),
        (TWO | {"class_names": np.array(5)}, r"class names have shape \[\], expected \[classes\]"),
        (TWO | {"class_names": np.array([["a", "b"]])}, r"class names have shape \[1, 2\]"),
        (TWO | {"class_names": np.array(["\ud800", "b"])}, r"class name \\ud800 is no text"),
        (TWO | {"class_names": np.array(["a", "b"], object)}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_cannot_be_used(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_samples(str(tmp_path / "d.npz"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no readable"), (b"PK\x03\x04 cut", "no readable"), (b"no zip at all", "no readable")],
)
def test_an_npz_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_samples(str(tmp_path / "d.npz"))


def with_header(file: Path, header: str) -> None:
    """An .npz whose inputs are described by `header`."""
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inputs.npy", raw)
        archive.writestr("labels.npy", b"")


def encrypted(file: Path) -> None:
    patched(file, flags=1)


def unknown_compression(file: Path) -> None:
    patched(file, method=97)


def patched(file: Path, **fields: int) -> None:
    """A sound .npz whose entries claim other `flags` or another `method`."""
    np.savez(file, **TWO)
    content = bytearray(file.read_bytes())
    for signature, places in ((b"PK\x01\x02", (8, 10)), (b"PK\x03\x04", (6, 8))):
        start = content.find(signature)
        while start >= 0:
            for name, place in zip(("flags", "method"), places, strict=True):
                content[start + place] = fields.get(name, content[start + place])
            start = content.find(signature, start + 4)
    file.write_bytes(content)


def no_array(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inputs", b"text")
        archive.writestr("labels", b"text")


def open_bracket(file: Path) -> None:
    with_header(file, "{'descr': '<f4', 'fortran_order': False, 'shape': (3,3\n")


def nested(file: Path) -> None:
    with_header(file, "(" * 4000 + ")" * 4000 + "\n")


def huge(file: Path) -> None:
    with_header(file, "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,3), }\n")


@pytest.mark.parametrize("make", [encrypted, unknown_compression, no_array, open_bracket, nested, huge])
def test_an_npz_made_to_hurt(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "d.npz")
    with pytest.raises(DataError, match="no readable") as caught:
        load_samples(str(tmp_path / "d.npz"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (5, "a int, expected one text"),
        ("ab", "a str, expected one text"),
        ([["a"], ["b"]], "a list, expected a text"),
        (("a", "\udcff"), r"\\udcff is no text"),
    ],
)
def test_class_names_of_a_factory_that_are_none(
    names: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_data.named_source", lambda: (*as_source(), names))
    with pytest.raises(DataError, match=message):
        load_samples("tests.test_data:named_source")


def test_a_class_folder_whose_name_is_no_text(folder: Path) -> None:
    shutil.copytree(folder / "ant", folder / os.fsdecode(b"\xff\xfe"))
    with pytest.raises(DataError, match=r"class name \\udcff\\udcfe is no text"):
        load_samples(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such folder: nowhere"),
        ("nowhere.npz", "no such file: nowhere.npz"),
        ("tests.test_data:nothing", "cannot import"),
        ("tests.test_data:not_samples", "gave a int"),
        ("tests.test_data:check_labels", "failed: TypeError"),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(source)


def test_resize_does_not_touch_arrays() -> None:
    with pytest.raises(DataError, match=r"size \[4, 4\], expected \[8, 8\]"):
        load_samples("tests.test_data:as_source", resize=(8, 8))


# ---- Images that cannot be used -------------------------------------------------------------------------


def test_folders_without_classes_or_images_are_named(folder: Path) -> None:
    (folder / "dog").mkdir()
    (folder / "dog" / "notes.txt").write_text("later")
    with pytest.raises(DataError, match=r"data/dog holds no images"):
        load_samples(str(folder))
    with pytest.raises(DataError, match="holds no class folders"):
        load_samples(str(folder / "ant"))


def bomb() -> bytes:
    """A PNG that declares 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no image that can be read"),
        (b"not an image", "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
        (bomb(), "refused: DecompressionBomb"),
    ],
)
def test_a_file_that_is_no_image_is_named(content: bytes, message: str, folder: Path) -> None:
    (folder / "bee" / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"bee/odd\.png.*{message}") as caught:
        load_samples(str(folder))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_named(kind: str, share: float, folder: Path) -> None:
    file = folder / "bee" / f"cut.{kind}"
    picture(5, (64, 64)).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"bee/cut\.{kind}"):
        load_samples(str(folder), resize=(6, 8))


def test_a_large_image_that_pillow_only_warns_of_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match=r"ant/000\.png is refused: DecompressionBombWarning"):
        load_samples(str(folder))


def test_sixteen_bit_images_are_not_silently_clipped(folder: Path) -> None:
    Image.fromarray(np.full((6, 8), 60_000, np.uint16)).save(folder / "ant" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits"):
        load_samples(str(folder))


def test_a_link_is_followed_and_a_dead_one_named(folder: Path, tmp_path: Path) -> None:
    picture(500).save(tmp_path / "outside.png")
    (folder / "ant" / "link.png").symlink_to(tmp_path / "outside.png")
    assert len(load_samples(str(folder)).labels) == 19
    (tmp_path / "outside.png").unlink()
    with pytest.raises(DataError, match=r"ant/link\.png cannot be read"):
        load_samples(str(folder))


def test_mixed_sizes_name_two_files_and_the_way_out(folder: Path) -> None:
    picture(99, (20, 30)).save(folder / "bee" / "large.png")
    with pytest.raises(DataError, match=r"ant/000\.png is 6x8x3, .*bee/large\.png is 20x30x3") as caught:
        load_samples(str(folder))
    assert "data.resize" in caught.value.hint


def test_mixed_channels_point_to_channels(folder: Path) -> None:
    picture(99, channels=1).save(folder / "bee" / "grey.png")
    with pytest.raises(DataError, match="6x8x1") as caught:
        load_samples(str(folder), channels=None)
    assert "data.channels" in caught.value.hint


# ---- Splits ---------------------------------------------------------------------------------------------


def test_splits_are_disjoint_stratified_and_mixed() -> None:
    counts = [400, 250, 150, 7]
    samples = random_samples(counts)
    splits = make_splits(samples, fit=101, calibration=203, holdout=250, seed=3)
    parts = (splits.fit, splits.calibration, splits.holdout)
    assert [len(part) for part in parts] == [101, 203, 250]
    assert len(rows(splits.fit) | rows(splits.calibration) | rows(splits.holdout)) == 554
    for label, count in enumerate(counts):
        share = 101 * count / sum(counts)
        assert abs(int((splits.fit.labels == label).sum()) - share) < 1
    # Sorted labels would make the first batches one class.
    assert len(set(splits.fit.labels[:20].tolist())) > 1
    lookup = {row.numpy().tobytes(): int(k) for row, k in zip(samples.inputs, samples.labels, strict=True)}
    for part in parts:
        assert [lookup[row.numpy().tobytes()] for row in part.inputs] == part.labels.tolist()


def test_the_seed_decides_and_the_order_of_the_source_does_not() -> None:
    samples = random_samples([40, 30])
    mixed = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    other = Samples(samples.inputs[mixed], samples.labels[mixed], None)

    def shas(given: Samples, seed: int) -> list[str]:
        splits = make_splits(given, fit=20, calibration=20, holdout=None, seed=seed)
        return [splits.fit.sha256, splits.calibration.sha256, splits.holdout.sha256]

    assert shas(samples, 0) == shas(other, 0)
    assert len(set(shas(samples, 0)) | set(shas(samples, 1))) == 6


def test_the_digest_is_of_inputs_and_labels() -> None:
    samples = random_samples([40, 40])
    swapped = Samples(samples.inputs, 1 - samples.labels, None)
    one, two = (make_splits(s, fit=2, calibration=2, holdout=None, seed=0) for s in (samples, swapped))
    assert one.holdout.sha256 != two.holdout.sha256


def test_renamed_files_give_the_same_splits(folder: Path) -> None:
    before = split(folder)
    for k, file in enumerate(sorted((folder / "ant").iterdir(), reverse=True)):
        file.rename(folder / "ant" / f"renamed{k}.png")
    assert split(folder).fit.sha256 == before.fit.sha256
    assert split(folder).holdout.sha256 == before.holdout.sha256


def test_copies_count_once_and_conflicting_copies_not_at_all() -> None:
    samples = random_samples([20, 20])
    copies = Samples(
        torch.cat([samples.inputs, samples.inputs[:5], samples.inputs[:1]]),
        torch.cat([samples.labels, samples.labels[:5], torch.tensor([1])]),
        None,
    )
    said: list[str] = []
    splits = make_splits(
        copies, fit=10, calibration=10, holdout=None, seed=0, progress=lambda what, *_: said.append(what)
    )
    everything = [*splits.fit.inputs, *splits.calibration.inputs, *splits.holdout.inputs]
    assert len(everything) == len({row.numpy().tobytes() for row in everything}) == 39
    assert samples.inputs[0].numpy().tobytes() not in {row.numpy().tobytes() for row in everything}
    assert said == ["7 duplicate samples left out"]


def test_copies_that_differ_in_the_sign_of_zero_are_copies() -> None:
    inputs = random_samples([9, 9]).inputs
    inputs[:, :, 0] = 0.0
    signed = inputs.clone()
    signed[:, :, 0] = -0.0
    labels = torch.arange(18) % 2
    twice = Samples(torch.cat([inputs, signed]), torch.cat([labels, labels]), None)
    made = make_splits(twice, fit=6, calibration=6, holdout=None, seed=0)
    assert len(made.holdout) == 6


def test_a_class_that_fit_cannot_cover_is_named() -> None:
    rare = make_splits(random_samples([900, 90, 2]), fit=9, calibration=9, holdout=9, seed=0)
    assert rare.fit.labels.bincount().tolist() == [7, 1, 1]
    with pytest.raises(DataError, match="fit: 2 samples leave out 1 classes, the first is '2'"):
        make_splits(random_samples([90, 90, 2]), fit=2, calibration=9, holdout=9, seed=0)


@pytest.mark.parametrize(("holdout", "needed"), [(None, 81), (40, 120)])
def test_too_few_samples_say_how_many(holdout: int | None, needed: int) -> None:
    with pytest.raises(DataError, match=f"got 80 samples, expected at least {needed}"):
        make_splits(random_samples([40, 40]), fit=40, calibration=40, holdout=holdout, seed=0)


def test_the_holdout_can_come_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = folder_of(tmp_path / "other", per_class=4, start=4)
    splits = split(folder, fit=5, calibration=5, holdout_source=str(other))
    # Each class's files 4 and 5 stand in both sources: they are the holdout's.
    assert len(splits.holdout) == 12
    assert not rows(splits.holdout) & (rows(splits.fit) | rows(splits.calibration))
    with pytest.raises(DataError, match=r"got 12 samples \(6 duplicates left out\), expected at least 13"):
        split(folder, fit=6, calibration=7, holdout_source=str(other))
    with pytest.raises(DataError, match="got 0 samples"):
        split(folder, holdout_source=str(folder))


def test_copies_are_found_between_bytes_and_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    labels = torch.arange(64) % 2
    floats = Samples(pixels[:10].float().div(255), labels[:10], None)
    splits = make_splits(Samples(pixels, labels, None), floats, fit=27, calibration=27, holdout=None, seed=0)
    assert not {row.float().div(255).numpy().tobytes() for row in splits.fit.inputs} & rows(splits.holdout)


def test_two_sources_must_agree(folder: Path, tmp_path: Path) -> None:
    other = folder_of(tmp_path / "other", start=50)
    (other / "cat").rename(other / "cow")
    with pytest.raises(DataError, match="other classes: cat, cow"):
        split(folder, holdout_source=str(other))
    (other / "cow").rename(other / "cat")
    for file in other.rglob("*.png"):
        picture(7, (9, 9)).save(file)
    with pytest.raises(DataError, match=r"shape \[3, 6, 8\], the holdout's \[3, 9, 9\]"):
        split(folder, holdout_source=str(other))


def test_labels_beyond_the_head_are_named(folder: Path) -> None:
    splits = split(folder)
    check_labels(splits, 3)
    with pytest.raises(DataError, match=r"label 2 \('cat'\) is beyond the head's 2 outputs"):
        check_labels(splits, 2)
