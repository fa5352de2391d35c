"""ExecuTorch's program for XNNPACK (.pte): one sample at a time, as edge devices run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.quiet import quiet, silent_stderr
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


class Executorch(Format):
    """One .pte file with a batch of one; quantized where the module was (executorch-int8)."""

    suffix: ClassVar[str] = ".pte"
    runtime: ClassVar[str] = "executorch"
    libraries: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`.

        Raises:
            CompressError: torch.export cannot trace it, or ExecuTorch cannot lower it.
        """
        with quiet(), silent_stderr():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

        sample = (torch.zeros(1, *example.shape[1:]),)
        try:
            with quiet(), silent_stderr(), torch.no_grad():
                program = torch.export.export(model, sample)
                lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                content = bytes(lowered.to_executorch().buffer)
        except Exception as error:
            # Broad, because every pass of the lowering raises its own; always re-raised.
            reason = first_line(error)
            raise CompressError(
                f"cannot export to .pte: {reason}", hint="the model must be traceable by torch.export"
            ) from error
        path.write_bytes(content)
