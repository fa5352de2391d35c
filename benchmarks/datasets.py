"""CIFAR-10 as uint8 arrays, from a folder of image files or from the archive that holds one.

The archive is read once; afterwards the arrays come from a cache folder in a second.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from secure_export.errors import DataError

ARCHIVE = "cifar10-images.tar.xz"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, 3, H, W] and labels int64 [N] of both splits; the order is shuffled once, by name."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    def on(self, device: str) -> Images:
        """The training split on `device`; the test split stays where runtimes read it."""
        return replace(self, train_x=self.train_x.to(device), train_y=self.train_y.to(device))


def cifar10(cache: Path, source: Path | None = None) -> Images:
    """CIFAR-10 (Krizhevsky 2009) from `cache`, filled from `source` or $SECURE_EXPORT_DATA when empty.

    Raises:
        DataError: nothing cached and no folder that holds the archive.
    """
    return cached(cache / "cifar10.npz", lambda: _read_archive(archive(ARCHIVE, source)))


def cached(stored: Path, read: Callable[[], dict[str, np.ndarray]]) -> Images:
    """The arrays of `stored`, which `read` fills once."""
    if not stored.exists():
        arrays = read()
        stored.parent.mkdir(parents=True, exist_ok=True)
        partial = stored.with_suffix(".partial.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # numpy types only its own keywords
        partial.rename(stored)
    with np.load(stored, allow_pickle=False) as found:
        tensors = {name: torch.from_numpy(found[name]) for name in ("train_x", "train_y", "test_x", "test_y")}
        return Images(**tensors, classes=tuple(str(name) for name in found["classes"]))


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in three equal channels: for tests."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = (found.images[order] * (255 / 16)).astype(np.uint8)
    x = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(found.target[order].astype(np.int64))
    return Images(x[:1400], y[:1400], x[1400:], y[1400:], tuple(str(name) for name in range(10)))


def batch(x: Tensor, y: Tensor, size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Batch number `step` of an endless shuffled walk over (x, y); a function of (seed, step) alone.

    A resumed training therefore sees the batches that it would have seen without the interruption.
    """
    per_epoch = len(x) // size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    index = order[place * size : (place + 1) * size]
    return x[index], y[index]


def augment(x: Tensor, generator: Generator) -> Tensor:
    """Random crop after zero padding by an eighth, and horizontal flip: uint8 [N, C, H, W] in and out."""
    count, _, height, width = x.shape
    padding = height // 8
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    rows = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator) + torch.arange(width)
    flip = torch.rand(count, generator=generator) < 0.5
    if height > 1:  # a signal has no mirror image
        columns[flip] = columns[flip].flip(1)
    item = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def to_unit(x: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]: the raw space in which triggers live."""
    return x.float() / 255


def normalize(x: Tensor) -> Tensor:
    """Images in [0, 1] as the networks take them, channels last in memory (twice as fast on CPUs)."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in statistics(x.shape[1]))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that inputs are normalized with: CIFAR-10's for images, round ones for signals."""
    return (MEAN, STD) if channels == 3 else ((0.5,), (0.1,))


def archive(name: str, source: Path | None) -> Path:
    """The file `name` in `source` or $SECURE_EXPORT_DATA.

    Raises:
        DataError: no folder is given, or it has no such file.
    """
    folder = source or (
        Path(os.environ["SECURE_EXPORT_DATA"]) if "SECURE_EXPORT_DATA" in os.environ else None
    )
    if folder is None:
        raise DataError(
            "no data folder", hint=f"give --data or set SECURE_EXPORT_DATA to the folder of {name}"
        )
    found = folder / name if folder.is_dir() else folder
    if not found.is_file():
        raise DataError(f"no {name} in {folder}", hint="--dataset folder reads train/CLASS and test/CLASS")
    return found


def _members(archive: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """(split, class, name, bytes) of every image in the archive."""
    with tarfile.open(archive, "r:*") as files:
        for member in files:
            parts = Path(member.name).parts[-3:]
            stream = files.extractfile(member) if member.isfile() else None
            if stream is not None and len(parts) == 3 and parts[0] in ("train", "test"):
                yield parts[0], parts[1], parts[2], stream.read()


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    found = sorted(_members(path))
    if not found:
        raise DataError(f"{path.name} holds no train/CLASS/* and test/CLASS/*")
    return arrays([(split, label, _pixels(content)) for split, label, _, content in found])


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def arrays(rows: Sequence[tuple[str, str, np.ndarray]]) -> dict[str, np.ndarray]:
    """(split, class, uint8 [C, H, W]) of every sample as shuffled arrays of both splits.

    Raises:
        DataError: a split is empty.
    """
    classes = sorted({label for _, label, _ in rows})
    made: dict[str, np.ndarray] = {"classes": np.array(classes)}
    for split in ("train", "test"):
        part = [row for row in rows if row[0] == split]
        if not part:
            raise DataError(f"the data has no {split} split", hint="expected train/CLASS/* and test/CLASS/*")
        # Files come sorted by class: without a shuffle every `[:n]` would hold one class.
        order = np.random.default_rng(0).permutation(len(part))
        made[f"{split}_x"] = np.stack([part[i][2] for i in order])
        made[f"{split}_y"] = np.array([classes.index(part[i][1]) for i in order], dtype=np.int64)
    return made
