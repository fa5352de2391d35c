"""The cost table: counted right, measured apart, drawn as ratios; no test asserts a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from secure_export import costs, digests
from secure_export.records.measured import Artifact, Cost
from secure_export.report import costs as table
from secure_export.report.html import to_html
from secure_export.report.markdown import to_markdown
from secure_export.report.schema import dump_report, load_report
from tests import compression
from tests.report_sample import sample_report

BASE = Cost("fp32 ONNX", "onnx", 4_000_000, 700_000, 35_000_000, 2.0, 80.0, 30_000_000, 1)
INT8 = replace(BASE, setting="int8", size=1_000_000, batch_1_ms=3.0, batch_64_ms=20.0, peak_bytes=None)


def test_multiplications_are_those_of_the_papers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    parameters = 3 * 8 * 9 + 8 + 8 * 16 * 5 + 5
    macs = 16 * 8 * 27 + 8 * 16 * 5
    assert costs.weights_and_macs(model, torch.rand(1, 3, 4, 4)) == (parameters, macs)
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert costs.weights_and_macs(depthwise, torch.rand(1, 8, 5, 5)) == (80, 9 * 8 * 9)
    assert costs.weights_and_macs(nn.ReLU(), torch.rand(1, 3)) is None


def test_file_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(compression.exported())
    file = Artifact("fp32", path, digests.of_file(path), path.stat().st_size, "onnx", "onnxruntime")
    found = costs.measured(file, compression.SHAPE, {})
    assert found.why == ""
    assert found.batch_1_ms
    assert found.batch_64_ms
    assert found.peak_bytes is None or found.peak_bytes > 0
    path.write_bytes(b"no ONNX")
    broken = costs.measured(file, compression.SHAPE, {})
    assert broken.batch_1_ms is None
    assert "cannot open model.onnx" in broken.why


def test_table_speaks_in_ratios() -> None:
    report = replace(sample_report(), costs=(BASE, INT8))
    first, second = table.rows(report)
    assert first[2] == "4.0 MB"
    assert second[2] == "1.0 MB (0.25x)"
    assert second[6] == "20.00 ms (0.25x)"
    assert second[7] == "–"
    assert second[8] == "slower than fp32 ONNX here at batch 1"
    for drawn in (to_markdown(report), to_html(report)):
        assert "1.0 MB (0.25x)" in drawn


def test_report_without_costs_has_no_table(tmp_path: Path) -> None:
    assert "## Costs" not in to_markdown(sample_report())
    path = tmp_path / "report.json"
    path.write_text(dump_report(replace(sample_report(), costs=(BASE, INT8))))
    assert load_report(path).costs == (BASE, INT8)
