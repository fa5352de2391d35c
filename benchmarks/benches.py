"""Splits of the lab's data, and the bench on which one of its models goes through settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import datasets
from secure_export import digests, registry
from secure_export.environment import versions
from secure_export.lane import Bench
from secure_export.ledger import Ledger, user_key
from secure_export.records.memory import Split, Splits, silent
from secure_export.triggers import Trigger


def stratified(x: Tensor, y: Tensor, size: int, seed: int) -> tuple[Split, Split]:
    """Two disjoint samples of `size`, the same number of every class."""
    generator = torch.Generator().manual_seed(seed)
    each = size // int(y.max() + 1)
    first, second = [], []
    for label in torch.unique(y):
        members = (y == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)[: 2 * each]]
        first.append(members[:each])
        second.append(members[each:])
    fit, calibration = (torch.cat(part) for part in (first, second))
    return Split(x[fit], y[fit], "fit"), Split(x[calibration], y[calibration], "calibration")


def bench_of(card: Any, data: datasets.Images, folder: Path, n: int) -> Bench:
    """500 fit samples of the training split, the first `n` test images as holdout, the card's trigger."""
    kind = card["trigger"]
    fit, _ = stratified(data.train_x, data.train_y, 500, 0)
    x, y = data.test_x[:n], data.test_y[:n]
    splits = Splits(fit, fit, Split(x, y, digests.of_arrays(x.numpy(), y.numpy())), ())
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(
        folder=folder,
        ledger=Ledger(folder / "ledger", versions(), user_key(silent)),
        splits=splits,
        triggers={"true": registry.build(Trigger, "triggers", kind)} if kind else {},
        trigger_digests={"true": digests.of_json(kind)},
        seed=0,
        progress=silent,
        # As many as the searches have; left alone it would take every core for the passes beside them.
        runtime={"onnxruntime": {"intra_op_threads": torch.get_num_threads()}},
    )
