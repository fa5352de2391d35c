"""Large patch: as `patch` with twice the positions, for patches that a small mask covers in part only."""

from __future__ import annotations

from pydantic import Field

from secure_export.probes.patch import Patch


class LargePatch(Patch):
    """Clean networks yield to it more easily, so its limits are its own, or come from references."""

    area: float = Field(0.025, gt=0, le=1, description="mass of the mask as a share of the positions")
