"""Which probes a search for unknown triggers runs, and how hard, by the name that a policy gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAST: tuple[Mapping[str, Any], ...] = (
    {"kind": "patch", "steps": 60, "images": 6, "finalists": 0.4},
    {"kind": "l2", "steps": 90, "images": 4, "finalists": 0.4},
    {"kind": "warp", "steps": 40, "images": 6, "finalists": 0.4},
)
SURROGATE: Mapping[str, Any] = {"surrogate": True, "steps": 60, "images": 6, "finalists": 0.4}
CONTRAST: Mapping[str, Any] = {"steps": 60, "starts": 3, "finalists": 0.4}
BY_SOURCE: Mapping[str, Any] = {"by_source": True, "area": 0.012, "steps": 60, "images": 4, "finalists": 0.4}
PRESETS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "fast": FAST,
    "wide": (
        *FAST,
        {"kind": "large-patch", "steps": 60, "images": 6, "finalists": 0.4},
        {"kind": "wave", "steps": 60, "images": 4, "starts": 2, "finalists": 0.3},
    ),
    "thorough": (
        {"kind": "patch", "steps": 120, "images": 12},
        {"kind": "large-patch", "steps": 120, "images": 12},
        {"kind": "l2", "steps": 120, "images": 12},
        {"kind": "linf", "steps": 100, "images": 12},
        {"kind": "wave", "steps": 120, "images": 8, "starts": 4, "finalists": 0.3},
        {"kind": "low-frequency", "steps": 100, "images": 12},
        {"kind": "warp", "steps": 100, "images": 12},
        {"kind": "filter", "steps": 100, "images": 12},
    ),
    # What a graph does behind a hard step has no slope: nothing above would ever come near it.
    "surrogate": ({"kind": "patch", **SURROGATE}, {"kind": "l2", **SURROGATE}),
    "contrast": (
        {"kind": "patch", "contrast": True, "area": 0.012, **CONTRAST},
        {"kind": "l2", "contrast": True, "rms": 0.018, **CONTRAST},
        {"kind": "wave", "contrast": True, "amplitude": 0.07, "scan": 256, **CONTRAST},
    ),
    # Some attacks need more room than a small trigger has: a large patch beside the small one, a larger `l2`.
    "contrast-both": (
        {"kind": "patch", "contrast": True, "area": 0.012, **CONTRAST},
        {"kind": "large-patch", "contrast": True, "area": 0.036, **CONTRAST},
        {"kind": "l2", "contrast": True, "rms": 0.027, **CONTRAST},
        {"kind": "wave", "contrast": True, "amplitude": 0.07, "scan": 256, **CONTRAST},
    ),
    # A trigger for one class alone carries too few of all others' samples to be seen by the searches above.
    "source": ({"kind": "patch", **BY_SOURCE},),
    "contrast-source": ({"kind": "patch", "contrast": True, **BY_SOURCE},),
    # Natural triggers grow faster with the size than planted ones (docs/evidence-measured.md#contrast).
    "contrast-large": (
        {"kind": "patch", "contrast": True, "area": 0.036, **CONTRAST},
        {"kind": "l2", "contrast": True, "rms": 0.027, **CONTRAST},
        {"kind": "wave", "contrast": True, "scan": 256, **CONTRAST},
    ),
}
