"""References of a file, made on the spot: its twin with the weights turned away and trained back on fit.

They are kept in the work folder, for a killed run and for the searches that come later.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from secure_export import digests
from secure_export.errors import CompressError
from secure_export.forgetting import References, Weights, forgotten, references, relearned
from secure_export.records.searches import Forgotten

if TYPE_CHECKING:
    from secure_export.evidence.files import Opened
    from secure_export.lane import Bench
    from secure_export.policy import ForgetSpec


def references_of(file: Opened, spec: ForgetSpec, bench: Bench) -> References:
    """The references of one file: one that searches avoid, and the judges.

    Raises:
        CompressError: the file has no twin with weights, or a reference did not learn the task again.
    """
    if file.twin is None:
        raise CompressError(f"no reference can be made on the spot: {file.why_no_twin}")
    twin, fit, ledger = file.twin, bench.splits.fit, bench.ledger

    def path(made: Forgotten) -> Path:
        return bench.folder / f"forgotten-{made.sha256[:16]}.safetensors"

    def weights(seed: int, steps: int) -> Weights:
        recipe = {"noise": spec.noise, "steps": steps}
        determined_by = (file.sha256, dict(file.environment), recipe, fit.sha256, seed)
        known = ledger.find(Forgotten, *determined_by)
        if known is not None and path(known).is_file():
            stored: Weights = load_file(path(known))
            if digests.of_state(stored) == known.sha256:
                return stored
        made = forgotten(twin, fit, noise=spec.noise, steps=steps, seed=seed, progress=bench.progress)
        known = Forgotten(digests.of_state(made))
        save_file({name: value.contiguous() for name, value in made.items()}, path(known))
        ledger.enter(known, *determined_by)
        return made

    effort: dict[str, Any] = {"steps": spec.steps, "longest": spec.longest, "least": spec.relearned}
    made = [
        relearned(partial(weights, bench.seed + number), twin, fit, **effort)
        for number in range(1 + spec.judges)
    ]
    return references(twin, made, fit, spec.relearned)
