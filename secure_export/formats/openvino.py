"""OpenVINO's intermediate representation, made from the same ONNX graph that ships elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.formats.onnx import exported, strip
from secure_export.openvino_files import packed
from secure_export.quiet import quiet
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


class Openvino(Format):
    """One .zip that holds model.xml and model.bin; weights stay in float32."""

    suffix: ClassVar[str] = ".zip"
    runtime: ClassVar[str] = "openvino"
    libraries: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`.

        Raises:
            CompressError: it cannot be exported to ONNX, or OpenVINO lacks an operator.
        """
        import openvino

        content = strip(exported(model, example)).SerializeToString(deterministic=True)
        try:
            with quiet():
                path.write_bytes(packed(openvino.Core().read_model(content)))
        except RuntimeError as error:
            raise CompressError(f"OpenVINO cannot read the export: {first_line(error)}") from error
