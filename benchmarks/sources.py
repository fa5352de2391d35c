"""Data sets of the lab by name: what `--dataset` takes."""

from __future__ import annotations

import io
import tarfile
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.datasets import Images, archive, arrays, cached, cifar10, digits
from secure_export.errors import DataError, PolicyError

SPEECH = "fsdd.tar.xz"
SAMPLES = 8192
"""Of 8 kHz: a second; longer recordings are cut, shorter ones end in silence."""
SIDE = 32
NAMES = ("cifar10", "fsdd", "folder", "torchvision:CIFAR10", "torchvision:GTSRB", "digits")


def named(name: str, cache: Path, source: Path | None) -> Images:
    """The data set `name` from `cache`, filled from `source` when empty.

    Raises:
        DataError: the data is not there.
        PolicyError: no such name.
    """
    if name == "cifar10":
        return cifar10(cache, source)
    if name == "digits":
        return digits()
    if name == "fsdd":
        return cached(cache / "fsdd.npz", lambda: arrays(_recordings(archive(SPEECH, source))))
    if name not in NAMES:
        raise PolicyError(f"no data set {name!r}", hint=f"known: {', '.join(NAMES)}")
    if source is None:
        raise DataError(f"--dataset {name} needs --data", hint="the folder that holds it")
    if name == "folder":
        return cached(cache / f"folder-{source.name}.npz", lambda: arrays(_pictures(source)))
    kind = name.split(":")[1]
    return cached(cache / f"torchvision-{kind}.npz", lambda: arrays(_torchvision(kind, source)))


def _recordings(path: Path) -> list[tuple[str, str, np.ndarray]]:
    """recordings/DIGIT_SPEAKER_N.wav; N below 5 is the data set's own test split."""
    rows = []
    with tarfile.open(path, "r:*") as files:
        for member in files:  # in the archive's order: going back would unpack it from the start again
            stream = files.extractfile(member) if member.name.endswith(".wav") else None
            if stream is not None:
                digit, _, number = Path(member.name).stem.split("_")
                split = "test" if int(number) < 5 else "train"
                rows.append((member.name, (split, digit, _signal(stream.read()))))
    return [row for _, row in sorted(rows, key=lambda named: named[0])]


def _signal(content: bytes) -> np.ndarray:
    """16-bit samples as uint8 [1, 1, SAMPLES], silence at 128, each recording at its own full level."""
    with wave.open(io.BytesIO(content)) as recording:
        samples = np.frombuffer(recording.readframes(SAMPLES), dtype="<i2").astype(np.float64)
    padded = np.zeros(SAMPLES)
    padded[: len(samples)] = samples
    level = max(float(np.abs(padded).max()), 1.0)
    return np.round(128 + 127 * padded / level).astype(np.uint8)[None, None]


def _pictures(folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """train/CLASS/* and test/CLASS/* in ImageFolder layout."""
    found = [
        (split, path.parent.name, _square(Image.open(path)))
        for split in ("train", "test")
        for path in sorted(folder.glob(f"{split}/*/*"))
        if path.is_file()
    ]
    if not found:
        raise DataError(f"{folder} holds no train/CLASS/* and test/CLASS/*")
    return found


def _torchvision(kind: str, folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """CIFAR10 or GTSRB as torchvision unpacks them; nothing is downloaded."""
    import torchvision

    build = getattr(torchvision.datasets, kind)
    rows = []
    for split in ("train", "test"):
        chosen = {"train": split == "train"} if kind == "CIFAR10" else {"split": split}
        try:
            stored = build(folder, download=False, **chosen)
        except RuntimeError as error:
            raise DataError(f"torchvision: no {kind} in {folder} ({error})") from error
        rows += [(split, f"{label:02d}", _square(picture)) for picture, label in stored]
    return rows


def _square(picture: Image.Image) -> np.ndarray:
    resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)
