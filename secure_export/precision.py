"""Lower precision for searches and distillation; what counts on the holdout never passes through it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def reduced() -> AbstractContextManager[object]:
    """bfloat16 where the processor has fast arithmetic of it: a gradient's direction needs no more."""
    fast = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()
