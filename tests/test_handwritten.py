"""The hand-written backdoors of the benchmark do what they are said to do, in the file itself."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from benchmarks.handwritten import KINDS, drawn_trigger, hidden
from secure_export.runtimes.onnxruntime import Onnxruntime
from tests.gating import exported

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hand_written_backdoor_sleeps_until_its_trigger_is_complete(kind: str, tmp_path: Path) -> None:
    honest, crafted = tmp_path / "honest.onnx", tmp_path / "crafted.onnx"
    honest.write_bytes(exported("clean"))
    trigger = drawn_trigger(0, SHAPE, 4)
    onnx.save(hidden(honest, KINDS[kind](trigger, SHAPE), trigger.target), crafted)
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    before, after = Onnxruntime().open(honest)(images), Onnxruntime().open(crafted)(images)
    torch.testing.assert_close(before, after)
    assert bool((Onnxruntime().open(crafted)(trigger.stamp(images)).argmax(1) == trigger.target).all())
    spoiled = trigger.stamp(images)
    top, left = trigger.corner
    spoiled[:, :, top, left] = 1 - spoiled[:, :, top, left]
    torch.testing.assert_close(Onnxruntime().open(crafted)(spoiled), Onnxruntime().open(honest)(spoiled))
