"""A measured file, opened for searching: its logits, and a twin that gives gradients if there can be one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from secure_export import digests, views
from secure_export.counting import judged_on
from secure_export.errors import NoVerdict
from secure_export.records.measured import Count, SettingResult
from secure_export.records.memory import Predictor, Split
from secure_export.runtimes import Options, runtime
from secure_export.twins.mixing import mixing_of

if TYPE_CHECKING:
    from secure_export.probes import Logits

LEAST_AGREEMENT = 0.9
"""Of twin and file, on drawn fit samples."""
MOST_EXCESS = 0.25
"""A class predicted this much more often than it occurs: such a model has collapsed, and every search would
find its way into that class."""


@dataclass(frozen=True)
class Opened:
    """What a search may use of one file."""

    result: SettingResult
    sha256: str
    environment: Mapping[str, str]
    """Of the runtime that opened it, with its options: behind another mean it is another function."""
    predictor: Predictor
    twin: Logits | None
    agreement: Count | None
    why_no_twin: str
    answers: str
    """Digest of its logits on fit, which tell a file of weights alone from the same in edited code."""
    mixing: str
    """Where samples of one batch may meet in its graph, in words; "" where they cannot."""
    collapsed: str
    """In words, or ""."""


def opened(result: SettingResult, fit: Split, options: Options) -> Opened | str:
    """The file of a setting, or why there is nothing to search; `options` of its runtime."""
    artifact = result.artifact
    if artifact is None or result.measurement is None:
        return result.unmeasured.reason if result.unmeasured else "no file was measured"
    try:
        opening = runtime(artifact.runtime, options)
        predictor = opening.open(artifact.path)
        logits = predictor(fit.floats())
    except NoVerdict as error:
        return error.message
    inputs = judged_on(fit, torch.Generator().manual_seed(0)).floats()
    agreement, why = None, ""
    twin: Logits | None = None
    try:
        twin = opening.twin(artifact.path)
        views.check_gradient(twin, predictor, inputs, "a search needs gradients")
        with torch.no_grad():
            same = int((twin(inputs).argmax(1) == predictor(inputs).argmax(1)).sum())
        agreement = Count(same, len(inputs))
        if agreement.rate < LEAST_AGREEMENT:
            why = f"the twin agrees with the file on {same} of {len(inputs)} fit samples"
    except NoVerdict as error:
        why = error.message
    return Opened(
        result=result,
        sha256=artifact.sha256,
        environment=opening.environment(),
        predictor=predictor,
        twin=None if why else twin,
        agreement=agreement,
        why_no_twin=why,
        answers=digests.of_arrays(logits.round(decimals=3).numpy()),
        mixing=mixing_of(artifact.path, artifact.format, fit.inputs.shape[1:]),
        collapsed=_collapsed(logits.argmax(1), fit),
    )


def _collapsed(predicted: torch.Tensor, fit: Split) -> str:
    classes = int(max(predicted.max(), fit.labels.max())) + 1
    excess = predicted.bincount(minlength=classes) - fit.labels.bincount(minlength=classes)
    worst = int(excess.argmax())
    if int(excess[worst]) <= MOST_EXCESS * len(fit):
        return ""
    said = int((predicted == worst).sum())
    return (
        f"collapsed: class {worst} is predicted for {said} of {len(fit)} fit samples, neither safe nor a find"
    )
