"""Clean labelled samples from where the user keeps them: a folder, an `.npz` file or a function."""

from __future__ import annotations

import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from secure_export.errors import DataError
from secure_export.factories import imported, local_code
from secure_export.records.memory import Progress, silent
from secure_export.words import described, printable

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may try; its other decoders start programs or read formats that no data set uses."""
BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged files, besides its own errors."""
REPORT_EVERY = 500
UNPACKED, DENSEST = 2**30, 100
"""An .npz beyond so many bytes may not unpack to more than so many times its own size: images never do."""


@dataclass(frozen=True)
class Samples:
    """`inputs` is uint8 (0..255) or float32 ([0, 1]), [N, ...]; labels int64 [N]; names may be unknown."""

    inputs: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None


def load_samples(
    path: str,
    *,
    resize: tuple[int, int] | None = None,
    channels: int | None = 3,
    progress: Progress = silent,
) -> Samples:
    """Samples of a folder of class folders, of `file.npz`, or of `package.module:factory`.

    `resize` (height, width) and `channels` (3 = RGB, 1 = grey, None = as the file is) speak of image files;
    arrays are taken as they are, and must have the size that `resize` names. A folder's labels follow the
    sorted names of its class folders. An `.npz` holds `inputs`, `labels` and perhaps `class_names`; a factory
    returns them in that order.

    Raises:
        DataError: no such source, or samples that cannot be used; the message names the file.
    """
    place = Path(path)
    if place.is_dir():
        return _from_folder(place, resize, channels, progress)
    if place.suffix == ".npz":
        samples = _from_npz(place)
    elif ":" in path and not place.exists():
        samples = _from_factory(path)
    elif place.exists():
        raise DataError(f"{path} is no folder of class folders and no .npz file")
    else:
        raise DataError(f"no such folder: {path}")
    if resize is not None and tuple(samples.inputs.shape[-2:]) != tuple(resize):
        raise DataError(
            f"{path} holds arrays of size {list(samples.inputs.shape[-2:])}, expected {list(resize)}",
            hint="data.resize works on image files; resize the arrays where they are made",
        )
    return samples


def _from_folder(
    folder: Path, resize: tuple[int, int] | None, channels: int | None, progress: Progress
) -> Samples:
    files, labels, names = _listed(folder)
    inputs: NDArray[np.uint8] | None = None
    with warnings.catch_warnings():
        # Pillow only warns up to twice its limit of pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, file in enumerate(files):
            pixels = _decoded(file, resize, channels)
            if inputs is None:
                inputs = np.empty((len(files), *pixels.shape), np.uint8)
            if pixels.shape != inputs.shape[1:]:
                raise DataError(
                    f"images of different sizes: {files[0]} is {_size(inputs[0])}, {file} is {_size(pixels)}",
                    hint="give --resize HEIGHTxWIDTH, or set data.resize to [height, width]"
                    if pixels.shape[1:] != inputs.shape[2:]
                    else "set data.channels to 3 or 1",
                )
            inputs[index] = pixels
            if (index + 1) % REPORT_EVERY == 0 or index + 1 == len(files):
                progress(f"reading {folder.name}", index + 1, len(files))
    return Samples(torch.from_numpy(inputs), torch.tensor(labels), names)


def _listed(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Image files, their labels and the class names, in one order on every machine."""
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if _visible(entry) and entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({described(error)})") from error
    names = _texts(classes, str(folder))
    if not names:
        raise DataError(f"{folder} holds no class folders", hint="expected CLASS/*.png (ImageFolder layout)")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(
            (
                file
                for file in (folder / name).rglob("*")
                if file.suffix.lower() in SUFFIXES and _visible(file)
            ),
            key=Path.as_posix,
        )
        if not found:
            raise DataError(f"class folder {folder / name} holds no images", hint="remove it, or fill it")
        files += found
        labels += [label] * len(found)
    return files, labels, names


def _visible(entry: Path) -> bool:
    return not entry.name.startswith((".", "__MACOSX"))


def _decoded(file: Path, resize: tuple[int, int] | None, channels: int | None) -> NDArray[np.uint8]:
    """Pixels [C, H, W] of one image file."""
    try:
        with Image.open(file, formats=DECODERS) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise DataError(
                    f"{file} has more than 8 bits per channel", hint="convert it, or use .npz floats"
                )
            grey = channels == 1 or (channels is None and image.mode in ("1", "L", "LA"))
            pixels = image.convert("L" if grey else "RGB")
            if resize is not None:
                pixels = pixels.resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
            array = np.asarray(pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file} is refused: {described(error)}", hint="a decompression bomb?") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is no image that can be read", hint="remove it") from error
    except BROKEN as error:
        raise DataError(f"{file} cannot be read ({described(error)})", hint="corrupt? remove it") from error
    return array[None] if grey else array.transpose(2, 0, 1)


def _size(pixels: NDArray[np.uint8]) -> str:
    """Height x width x channels."""
    return "x".join(str(side) for side in (*pixels.shape[1:], pixels.shape[0]))


def _from_npz(file: Path) -> Samples:
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    try:
        _check_bomb(file)
        with np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in ("inputs", "labels") if name not in arrays]
            if missing:
                raise DataError(f"{file} holds no array {missing[0]!r}, expected inputs and labels")
            held = [arrays[name] for name in ("inputs", "labels", "class_names") if name in arrays]
    except DataError:
        raise
    except Exception as error:
        # Broad, because crafted archives and headers make their readers raise anything; always re-raised.
        raise DataError(f"{file} is no readable .npz file ({described(error)})") from error
    if not all(isinstance(array, np.ndarray) for array in held):
        raise DataError(f"{file} is no readable .npz file: it holds raw bytes, expected arrays")
    return _checked(held[0], held[1], held[2] if len(held) == 3 else None, str(file))


def _check_bomb(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(UNPACKED, DENSEST * file.stat().st_size):
        raise DataError(
            f"{file} is refused: it unpacks to {unpacked} bytes from {file.stat().st_size}",
            hint="a decompression bomb? write it with np.savez",
        )


def _from_factory(spec: str) -> Samples:
    factory = imported(spec, DataError)
    with local_code(f"{spec} failed", DataError):
        given = factory()
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise DataError(
            f"{spec} gave a {type(given).__name__}, expected (inputs, labels) or with class names"
        )
    inputs, labels = (_array(value) for value in given[:2])
    return _checked(inputs, labels, given[2] if len(given) == 3 else None, spec)


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _checked(inputs: NDArray[Any], labels: NDArray[Any], names: Any, where: str) -> Samples:
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or not inputs.size:
        raise DataError(
            f"{where}: inputs have shape {list(inputs.shape)} and labels {list(labels.shape)}, "
            "expected [N, ...] and [N] with at least one sample"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels are {labels.dtype}, expected integers from 0")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"{where}: labels from {labels.min()} to {labels.max()}, expected small integers from 0"
        )
    named = None if names is None else _texts(names, where)
    if named is not None and (labels.max() >= len(named) or len(set(named)) != len(named)):
        raise DataError(
            f"{where}: {len(named)} class names {_few(named)} do not name labels 0..{labels.max()}"
        )
    return Samples(_pixels(inputs, where), torch.from_numpy(labels.astype(np.int64)), named)


def _texts(names: Any, where: str) -> tuple[str, ...]:
    """Class names as every report can hold them."""
    if isinstance(names, np.ndarray):
        if names.ndim != 1:
            raise DataError(f"{where}: class names have shape {list(names.shape)}, expected [classes]")
        names = names.tolist()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise DataError(f"{where}: class names are a {type(names).__name__}, expected one text per class")
    return tuple(_text(name, where) for name in names)


def _text(name: Any, where: str) -> str:
    if isinstance(name, Iterable) and not isinstance(name, str | bytes):
        raise DataError(f"{where}: a class name is a {type(name).__name__}, expected a text")
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: class name {printable(str(name))} is no text that can be stored as UTF-8",
            hint="rename it",
        ) from error
    return str(name)


def _pixels(inputs: NDArray[Any], where: str) -> Tensor:
    if inputs.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(inputs))
    if inputs.dtype.kind != "f":
        raise DataError(f"{where}: inputs are {inputs.dtype}, expected uint8 or floats in [0, 1]")
    if not np.isfinite(inputs).all():
        raise DataError(f"{where}: inputs hold NaN or infinity")
    if inputs.min() < 0 or inputs.max() > 1:
        raise DataError(
            f"{where}: inputs range from {inputs.min():.3g} to {inputs.max():.3g}, expected [0, 1]",
            hint="give raw inputs; normalization belongs to subject.mean and subject.std",
        )
    return torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32))


def _few(names: Sequence[str]) -> str:
    return "(" + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") + ")"
