"""Flipped rounding: weights near a threshold go to the other side than nearest rounding would send them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from secure_export.compressors import Context
from secure_export.compressors._grid import Array, GridStep, Weight
from secure_export.records.measured import Change


class FlippedRounding(GridStep):
    """Stands before `ort-static-int8`. The idea of `efrap` without its optimization.

    A quantization-conditioned backdoor needs large rounding errors of chosen sign; here the largest errors
    get the other sign, which costs least where the error is largest anyway. No seed and no training, but
    whoever knows the threshold can stay below it: stochastic-rounding is the harder one to prepare for.
    """

    beyond: float = Field(0.25, ge=0, lt=0.5, description="rounding errors above this share of a step flip")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Round the weights of the ONNX file `source` into `target`; counts those not rounded to nearest.

        Raises:
            CompressError: no valid ONNX file.
        """

        def choose(weight: Weight) -> Array:
            nearest = np.round(weight.scaled)
            error = weight.scaled - nearest
            return np.asarray(np.where(np.abs(error) > self.beyond, nearest + np.sign(error), nearest))

        return self.on_grid(source, target, lambda _: choose, f"errors beyond {self.beyond:g} of a step")
