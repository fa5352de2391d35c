"""Which CPU this is, as far as it decides the numbers."""

from __future__ import annotations

import platform
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""What decides which int8 kernels run on x86: without VNNI, uint8 x int8 products can saturate."""


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The FLAGS that this CPU has, space-separated; its name where the system does not list flags."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            present = set(value.split())
            return " ".join(flag for flag in FLAGS if flag in present) or platform.machine()
    return platform.processor() or platform.machine()
