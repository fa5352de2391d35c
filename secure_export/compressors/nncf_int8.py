"""Static int8 by NNCF for OpenVINO: on the written file, ranges from the calibration split."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.errors import CompressError
from secure_export.openvino_files import packed, unpacked
from secure_export.quiet import quiet
from secure_export.records.measured import Change
from secure_export.words import first_line

WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")


class NncfInt8(FileStep):
    """Weights are symmetric, per output channel; activations as `preset` says."""

    libraries: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    extra: ClassVar[str] = "openvino"
    works_on: ClassVar[str] = "openvino"

    preset: Literal["performance", "mixed"] = Field(
        "performance", description="performance: activations symmetric too; mixed: activations not"
    )
    ranges: Literal["minmax", "mean"] = Field(
        "minmax",
        description="of activations: the extremes over all samples; or NNCF's own default, the mean of each "
        "sample's extremes, which clips what lies beyond",
    )
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the OpenVINO file `source` into `target`; counts layers whose inputs are on a grid.

        Raises:
            CompressError: no OpenVINO file, or NNCF cannot quantize it.
        """
        split = context.calibration
        inputs = [split.floats(slice(i, i + 1)).numpy() for i in range(min(self.samples, len(split)))]
        try:
            with quiet():
                import nncf
                from nncf.quantization.range_estimator import RangeEstimatorParametersSet

                ranges = {"minmax": "MINMAX", "mean": "MEAN_MINMAX"}[self.ranges]
                model = nncf.quantize(
                    unpacked(source),
                    nncf.Dataset(inputs),
                    preset=nncf.QuantizationPreset(self.preset),
                    subset_size=len(inputs),
                    advanced_parameters=nncf.AdvancedQuantizationParameters(
                        activations_range_estimator_params=getattr(RangeEstimatorParametersSet, ranges)
                    ),
                )
                content = packed(model)
        except (CompressError, RuntimeError, ValueError, AttributeError) as error:
            reason = first_line(error)
            raise CompressError(f"{self.kind}: cannot quantize {source.name}: {reason}") from error
        layers = [node for node in model.get_ops() if node.get_type_name() in WEIGHTED]
        changed = sum(node.input_value(0).get_node().get_type_name() == "FakeQuantize" for node in layers)
        if not changed:
            raise CompressError(f"{self.kind}: cannot quantize {source.name}: no layer was changed")
        target.write_bytes(content)
        return Change(
            self.kind, changed, len(layers), "tensors", f"{self.preset}, {self.ranges}, weights per channel"
        )
