"""ExecuTorch with XNNPACK: the .pte file, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from secure_export.errors import CompressError
from secure_export.quiet import quiet, silent_stderr
from secure_export.records.memory import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import read
from secure_export.runtimes._cpu import cpu
from secure_export.words import first_line


class Executorch(Runtime):
    """Its files hold one compiled blob, so no head can be read from them: see Runtime.reads_heads."""

    libraries: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"
    reads_heads: ClassVar[bool] = False

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no such file, or ExecuTorch cannot run it.
        """
        if read(path)[4:8] != b"ET12":
            raise CompressError(f"{path.name} is no ExecuTorch program")
        try:
            with quiet(), silent_stderr():
                from executorch.runtime import Runtime as Loader
                from executorch.runtime import Verification

                # By path: a program loaded from bytes reads them after they are gone.
                method = Loader.get().load_program(path, verification=Verification.InternalConsistency)
                forward = method.load_method("forward")
        except (RuntimeError, ValueError) as error:
            raise CompressError(f"ExecuTorch cannot open {path.name}: {first_line(error)}") from error
        if forward is None:
            raise CompressError(f"ExecuTorch cannot open {path.name}: it has no method forward")

        def predict(inputs: Tensor) -> Tensor:
            if not len(inputs):
                return predict(torch.zeros(1, *inputs.shape[1:]))[:0]
            samples = inputs.float().contiguous()
            try:
                with silent_stderr():
                    parts = [forward.execute([sample[None]])[0].clone().float() for sample in samples]
            except RuntimeError as error:
                raise CompressError(f"ExecuTorch cannot run {path.name}: {first_line(error)}") from error
            return torch.cat(parts)

        return predict

    def view(self, path: Path, setting: str) -> View:
        """Never: the file is one compiled blob.

        Raises:
            CompressError: always.
        """
        raise CompressError(
            f"no head can be read from {path.name}: it is compiled",
            hint="add a setting with the same steps in format pt2: locators read that one",
        )

    def environment(self) -> Mapping[str, str]:
        """Version and backend, and the CPU."""
        return {
            "executorch": metadata.version("executorch"),
            "backend": "XNNPACK",
            "batch_size": "1",
            "cpu": cpu(),
        }
