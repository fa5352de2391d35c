"""A found trigger as a small PNG for the report."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from secure_export.perturbations import Perturbation

SIDE = 96
"""Pixels that a small picture is enlarged to."""
GREY = 0.5


def picture(found: Perturbation, number: int, shape: torch.Size) -> str:
    """PNG, base64: what perturbation `number` does to a grey image; "" for inputs that are no image.

    A change fainter than a quarter of the range is amplified to it; a warp is drawn on stripes.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        return ""
    which = torch.tensor([number])
    canvas = torch.full((1, *shape), GREY)
    if found.flow is not None:
        rows, columns = torch.meshgrid(*(torch.arange(side) // 4 for side in shape[1:]), indexing="ij")
        canvas = (0.2 + 0.6 * ((rows + columns) % 2).float()).expand(1, *shape).clone()
        drawn = found.stamp(canvas, which)[0]
    else:
        change = found.stamp(canvas, which)[0] - canvas[0]
        drawn = GREY + change * max(1.0, 0.25 / max(float(change.abs().max()), 1e-6))
    return base64.b64encode(_png(drawn.clamp(0, 1))).decode()


def _png(image: Tensor) -> bytes:
    pixels = (255 * image).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    drawn = Image.fromarray(array)
    scale = max(1, SIDE // max(drawn.size))
    drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
