"""LiteRT's flatbuffer (.tflite): one sample at a time, inputs [1, C, H, W] as everywhere else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.litert_files import renamed
from secure_export.quiet import quiet, silent_stderr
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


class Litert(Format):
    """One .tflite file with a batch of one; needs a torch that litert-torch allows (2.14 at the latest)."""

    suffix: ClassVar[str] = ".tflite"
    runtime: ClassVar[str] = "litert"
    libraries: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert")
    extra: ClassVar[str] = "litert"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`.

        Raises:
            CompressError: torch.export cannot trace it, or LiteRT lacks an operator.
        """
        sample = (torch.zeros(1, *example.shape[1:]),)
        try:
            with quiet(), silent_stderr(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                import litert_torch

                made = Path(folder, "model.tflite")
                litert_torch.convert(model, sample).export(str(made))
                content = renamed(made.read_bytes())
        except Exception as error:
            # Broad, because torch.export, MLIR and the flatbuffer writer raise their own; always re-raised.
            reason = first_line(error)
            raise CompressError(
                f"cannot export to .tflite: {reason}", hint="the model must be traceable by torch.export"
            ) from error
        path.write_bytes(content)
