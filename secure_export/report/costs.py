"""The cost table: what each shipped file costs, as ratios to the first row's, measured in the same run.

The first is fp32 ONNX, or the file that another tool's is compared with, or that one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secure_export.records.measured import Cost
from secure_export.records.reported import Report
from secure_export.report._tables import in_megabytes

COLUMNS = ("setting", "format", "size", "parameters", "MACs", "batch 1", "batch 64", "peak memory", "remark")


def rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """One row a file under COLUMNS; the first is what the ratios in the others speak of."""
    return tuple(_row(cost, report.costs[0]) for cost in report.costs)


def _row(cost: Cost, base: Cost) -> tuple[str, ...]:
    pairs = (
        (in_megabytes, cost.size, base.size),
        (_short, cost.parameters, base.parameters),
        (_short, cost.macs, base.macs),
        (_milliseconds, cost.batch_1_ms, base.batch_1_ms),
        (_milliseconds, cost.batch_64_ms, base.batch_64_ms),
        (in_megabytes, cost.peak_bytes, base.peak_bytes),
    )
    cells = [_compared(shown, value, None if cost is base else of) for shown, value, of in pairs]
    return (cost.setting, cost.format, *cells, cost.why or ("" if cost is base else _slower(cost, base)))


def explained(report: Report) -> str:
    """What the numbers are of."""
    threads = report.costs[0].threads
    return (
        f"Latency is the median of warm calls in a process of its own, {threads} thread on one core; MACs "
        "are those of convolutions and linear layers, per sample; peak memory is what opening the file and "
        "running 64 samples takes beyond the runtime itself. Latency and memory belong to this machine."
    )


def _compared(shown: Callable[[Any], str], value: float | None, base: float | None) -> str:
    """`2.1 MB (0.27x)`."""
    if value is None:
        return "–"
    return f"{shown(value)} ({value / base:.2f}x)" if base else shown(value)


def _slower(cost: Cost, base: Cost) -> str:
    pairs = {1: (cost.batch_1_ms, base.batch_1_ms), 64: (cost.batch_64_ms, base.batch_64_ms)}
    slow = [str(n) for n, (own, full) in pairs.items() if own is not None and full is not None and own > full]
    return f"slower than {base.setting} here at batch {' and '.join(slow)}" if slow else ""


def _short(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms"
