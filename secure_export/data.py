"""Clean samples to disjoint, seeded, class-stratified splits: defences see fit, measuring sees holdout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secure_export import digests
from secure_export.errors import DataError
from secure_export.records.memory import Progress, Split, Splits, silent
from secure_export.sources import Samples, load_samples


def split_data(
    source: str,
    *,
    holdout_source: str | None = None,
    fit: int,
    calibration: int,
    holdout: int | None,
    seed: int,
    resize: tuple[int, int] | None = None,
    channels: int | None = 3,
    progress: Progress = silent,
) -> Splits:
    """Load clean samples (see `load_samples`) and split them; sizes are counts of samples.

    fit and calibration come from `source`; the holdout from `holdout_source`, or from `source` where that is
    None; `holdout` None takes all that is left.

    Raises:
        DataError: the samples cannot be used, or are too few.
    """
    first = load_samples(source, resize=resize, channels=channels, progress=progress)
    if holdout_source is None:
        return make_splits(
            first, fit=fit, calibration=calibration, holdout=holdout, seed=seed, progress=progress
        )
    second = load_samples(holdout_source, resize=resize, channels=channels, progress=progress)
    return make_splits(
        first, second, fit=fit, calibration=calibration, holdout=holdout, seed=seed, progress=progress
    )


def make_splits(
    samples: Samples,
    holdout_samples: Samples | None = None,
    *,
    fit: int,
    calibration: int,
    holdout: int | None,
    seed: int,
    progress: Progress = silent,
) -> Splits:
    """Disjoint splits, each with the floor or ceiling of every class's share, a rare class at least one.

    A sample is its content: of exact copies one stays (none where their labels differ), and what the holdout
    source holds is taken out of `samples`. So the splits do not depend on file names or on their order.

    Raises:
        DataError: too few samples, a class that `fit` cannot cover, or two sources that do not agree.
    """
    names = _agreed_names(samples, holdout_samples)
    usable, usable_holdout = _usable(samples, holdout_samples)
    left_out = len(samples.labels) - len(usable)
    if left_out:
        progress(f"{left_out} duplicate samples left out", 1, 1)
    generator = torch.Generator().manual_seed(seed)
    if holdout_samples is None:
        parts = _parts(samples.labels, usable, [fit, calibration, holdout], generator)
    else:
        parts = _parts(samples.labels, usable, [fit, calibration], generator)
        parts += _parts(holdout_samples.labels, usable_holdout, [holdout], generator)
    uncovered = set(samples.labels.tolist()) - set(samples.labels[parts[0]].tolist())
    gone = uncovered - set(samples.labels[usable].tolist())
    if gone:
        raise DataError(
            f"class {names[min(gone)]!r} has no sample of its own: each has copies with another label, or "
            "in the holdout",
            hint="a sample belongs to one class and one source",
        )
    if uncovered:
        raise DataError(
            f"fit: {fit} samples leave out {len(uncovered)} classes, the first is {names[min(uncovered)]!r}",
            hint="raise data.fit, or give more samples of that class",
        )
    return Splits(
        fit=_split(samples, parts[0]),
        calibration=_split(samples, parts[1]),
        holdout=_split(samples if holdout_samples is None else holdout_samples, parts[2]),
        class_names=names,
    )


def check_labels(splits: Splits, classes: int) -> None:
    """Every label must be an output of the head, and every output have its name.

    Raises:
        DataError: a label beyond `classes` outputs, or fewer names than outputs: where a class folder lacks,
            all behind it get another label.
    """
    names = splits.class_names
    highest = max(int(split.labels.max()) for split in (splits.fit, splits.calibration, splits.holdout))
    if highest >= classes:
        raise DataError(
            f"label {highest} ({names[highest]!r}) is beyond the head's {classes} outputs",
            hint="the data and the model must speak of the same classes",
        )
    if len(names) != classes and names != tuple(map(str, range(len(names)))):
        raise DataError(
            f"the data has {len(names)} classes, the model {classes} outputs",
            hint="labels are places among the sorted folder names, so every class needs its folder",
        )


def _usable(samples: Samples, holdout_samples: Samples | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of distinct samples in each source; what the holdout source holds is the holdout's alone."""
    keys = _keys(samples, holdout_samples)
    usable = _distinct(keys[0], samples.labels)
    if holdout_samples is None:
        return usable, np.empty(0, np.int64)
    return usable[~np.isin(keys[0][usable], keys[1])], _distinct(keys[1], holdout_samples.labels)


def _parts(
    labels: Tensor, usable: NDArray[np.int64], wanted: Sequence[int | None], generator: torch.Generator
) -> list[Tensor]:
    """Disjoint index tensors into `labels`, one per wanted size (None: all that is left, at least one)."""
    needed = sum(1 if size is None else size for size in wanted)
    if needed > len(usable):
        duplicates = len(labels) - len(usable)
        raise DataError(
            f"got {len(usable)} samples{f' ({duplicates} duplicates left out)' if duplicates else ''}, "
            f"expected at least {needed} for the splits",
            hint="lower data.fit, data.calibration or data.holdout, or give more samples",
        )
    # Shuffled first: sources are sorted by class.
    order = usable[torch.randperm(len(usable), generator=generator).numpy()]
    classes = labels.numpy()[order]
    part = np.full(len(order), -1)
    for number, size in enumerate(wanted):
        free = part < 0
        taken = free if size is None else _stratified(classes, free, size)
        part[taken] = number
    return [torch.from_numpy(order[part == number]) for number in range(len(wanted))]


def _stratified(classes: NDArray[np.int64], free: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """Mask of `size` free samples: of each class the floor or the ceiling of its share."""
    counts = np.bincount(classes[free])
    shares = size * counts / counts.sum()
    quota = np.floor(shares).astype(int)
    ties = np.argsort(quota - shares, kind="stable")
    quota[ties[: size - quota.sum()]] += 1
    # Locators and purifiers need every class, so a rare one gets a sample of the largest class's.
    for rare in np.flatnonzero((quota == 0) & (counts > 0)):
        largest = quota.argmax()
        if quota[largest] > 1:
            quota[[largest, rare]] += [-1, 1]
    taken = np.zeros_like(free)
    for label, number in enumerate(quota):
        taken[np.flatnonzero(free & (classes == label))[:number]] = True
    return taken


def _distinct(keys: NDArray[np.bytes_], labels: Tensor) -> NDArray[np.int64]:
    """Indices of one sample per content, in the order of contents; copies with different labels all go."""
    unique, first, which = np.unique(keys, return_index=True, return_inverse=True)
    lowest, highest = np.full(len(unique), np.iinfo(np.int64).max), np.full(len(unique), -1)
    np.minimum.at(lowest, which, labels.numpy())
    np.maximum.at(highest, which, labels.numpy())
    kept: NDArray[np.int64] = first[lowest == highest]
    return kept


def _keys(*sources: Samples | None) -> list[NDArray[np.bytes_]]:
    """Content digest per sample; sources of different dtypes are compared as floats."""
    given = [source for source in sources if source is not None]
    shapes = {tuple(source.inputs.shape[1:]) for source in given}
    if len(shapes) > 1:
        raise DataError(
            f"samples have shape {list(given[0].inputs.shape[1:])}, "
            f"the holdout's {list(given[1].inputs.shape[1:])}",
            hint="give --resize HEIGHTxWIDTH, or set data.resize to [height, width]",
        )
    mixed = len({source.inputs.dtype for source in given}) > 1
    return [
        np.array([hashlib.sha256(_bytes(row, mixed)).digest() for row in source.inputs], dtype="S32")
        for source in given
    ]


def _bytes(row: Tensor, mixed: bool) -> bytes:
    if row.is_floating_point():
        row = row + 0.0  # -0.0 is the same pixel as 0.0
    elif mixed:
        row = row.float().div(255)
    return row.numpy().tobytes()


def _agreed_names(samples: Samples, holdout_samples: Samples | None) -> tuple[str, ...]:
    sources = [samples] if holdout_samples is None else [samples, holdout_samples]
    given = [source.class_names for source in sources if source.class_names is not None]
    if len(set(given)) > 1:
        odd = sorted(set(given[0]) ^ set(given[1])) or ["the same names in another order"]
        raise DataError(
            f"the holdout source has other classes: {', '.join(odd[:5])}",
            hint="both need the same class folders",
        )
    highest = max(int(source.labels.max()) for source in sources)
    if not given:
        return tuple(str(label) for label in range(highest + 1))
    if highest >= len(given[0]):
        raise DataError(f"label {highest} has no name, the sources name {len(given[0])} classes")
    return given[0]


def _split(samples: Samples, index: Tensor) -> Split:
    inputs, labels = samples.inputs[index], samples.labels[index]
    return Split(inputs, labels, digests.of_arrays(inputs.numpy(), labels.numpy()))
