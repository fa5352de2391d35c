"""Least-distance programming (Lawson and Hanson 1974, ch. 23): the shortest vector within linear bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def shortest(rows: Array, bounds: Array) -> Array | None:
    """argmin |s| subject to rows [J, D] s >= bounds [J]; None where no s does it.

    The multipliers are a non-negative least-squares problem in J variables.
    """
    from scipy.optimize import nnls

    if (bounds <= 0).all():
        return np.zeros(rows.shape[1])
    stacked = np.vstack([rows.T, bounds])
    aim = np.zeros(len(stacked))
    aim[-1] = 1.0
    multipliers, residual = nnls(stacked, aim)
    if residual < 1e-9:
        return None
    rest = stacked @ multipliers - aim
    found: Array = -rest[:-1] / rest[-1]
    return found
