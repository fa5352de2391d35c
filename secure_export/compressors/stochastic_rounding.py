"""Stochastic rounding: chance decides the side of every weight, so nobody can have prepared it."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
from pydantic import Field

from secure_export.compressors import Context
from secure_export.compressors._grid import Array, GridStep, Weight
from secure_export.records.measured import Change


class StochasticRounding(GridStep):
    """Stands before `ort-static-int8`: a weight 0.3 steps above a code goes up with probability 0.3.

    A quantization-conditioned backdoor needs every weight to fall to the side that its maker foresaw, so
    the seed must be one that he cannot know when he hands the model over. Later it is no secret: the report
    has it.
    """

    seed: int | None = Field(None, ge=0, description="null = drawn anew, and recorded in the report")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Round the weights of the ONNX file `source` into `target`; counts those not rounded to nearest.

        Raises:
            CompressError: no valid ONNX file.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        generator = np.random.default_rng(seed)

        def choose(weight: Weight) -> Array:
            return np.asarray(np.floor(weight.scaled + generator.random(weight.scaled.shape)))

        return self.on_grid(source, target, lambda _: choose, f"seed {seed}")
