"""A user's trigger file as a tensor: pictures through Pillow, arrays through numpy (never a pickle)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from secure_export.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_picture(path: Path, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Picture file as float32 [channels, H, W] in [0, 1]; `size` = (H, W) resizes it.

    Raises:
        DataError: unreadable, or an image of neither 1 nor 3 channels is wanted.
    """
    from PIL import Image

    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise DataError(
            f"{path}: a picture has 1 or 3 channels, the inputs have {channels}",
            hint="give the trigger as an .npy array instead",
        )
    try:
        with Image.open(path) as opened:
            picture = opened.convert(modes[channels])
    # Pillow's PNG reader raises SyntaxError on a broken chunk.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})", hint="PNG is a safe choice") from error
    if size is not None:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / np.float32(255))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def read_array(path: Path) -> Tensor:
    """`.npy` file as a finite float32 tensor.

    Raises:
        DataError: unreadable, a pickle, not real numbers, or NaN or infinite somewhere.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        what = array.dtype if isinstance(array, np.ndarray) else "an .npz archive"
        raise DataError(f"{path}: got {what}, expected one array of real numbers")
    tensor = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{path}: holds NaN or infinite values")
    return tensor


def read_unit(path: Path, channels: int) -> Tensor:
    """Picture or `.npy` file as float32 in [0, 1].

    Raises:
        DataError: unreadable, or an array that leaves [0, 1].
    """
    if path.suffix.lower() != ".npy":
        return read_picture(path, channels)
    tensor = read_array(path)
    if tensor.numel() == 0 or not 0 <= float(tensor.min()) <= float(tensor.max()) <= 1:
        raise DataError(
            f"{path}: expected values in [0, 1], got shape {tuple(tensor.shape)}"
            + (f" in [{float(tensor.min()):g}, {float(tensor.max()):g}]" if tensor.numel() else ""),
            hint="divide 8-bit values by 255",
        )
    return tensor
