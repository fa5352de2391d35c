"""Int8 by LiteRT's quantizer (ai-edge-quantizer): on the written file, weights per output channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.errors import CompressError
from secure_export.litert_files import interpreter
from secure_export.quiet import quiet, silent_stderr
from secure_export.records.measured import Change
from secure_export.records.memory import Split
from secure_export.words import first_line

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
RECIPES = {"static": "static_wi8_ai8", "dynamic": "dynamic_wi8_afp32", "float": "weight_only_wi8_afp32"}


class LitertInt8(FileStep):
    """int8 weights on absmax/127; activations int8 from the calibration split, or on the fly, or float."""

    libraries: ClassVar[tuple[str, ...]] = ("ai_edge_quantizer", "ai_edge_litert")
    extra: ClassVar[str] = "litert"
    works_on: ClassVar[str] = "litert"

    activations: Literal["static", "dynamic", "float"] = Field(
        "static", description="int8 by calibration; int8 on the fly; or float, for small files alone"
    )
    ranges: Literal["minmax", "moving"] = Field(
        "minmax",
        description="of static activations: the extremes over all samples; or LiteRT's own default, a moving "
        "average of each sample's extremes, which clips what lies beyond",
    )
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the .tflite file `source` into `target`; counts layers whose weights are integers.

        Raises:
            CompressError: no .tflite file, or it cannot be quantized.
        """
        try:
            content = source.read_bytes()
            interpreter(content, source.name)
            made = self._quantized(source, context.calibration)
            changed, total = _weights(interpreter(made, target.name))
        except OSError as error:
            raise CompressError(
                f"{self.kind}: cannot quantize {source.name}: {error.strerror or error}"
            ) from error
        except (CompressError, RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = first_line(error)
            raise CompressError(f"{self.kind}: cannot quantize {source.name}: {reason}") from error
        if not changed:
            raise CompressError(f"{self.kind}: cannot quantize {source.name}: no layer was changed")
        target.write_bytes(made)
        return Change(self.kind, changed, total, "tensors", f"{self.activations} activations")

    def _quantized(self, source: Path, split: Split) -> bytes:
        with quiet(), silent_stderr():
            from ai_edge_quantizer import quantizer, recipe

            work = quantizer.Quantizer(str(source))
            work.load_quantization_recipe(getattr(recipe, RECIPES[self.activations])())
            ranges = self._ranges(work, source, split) if work.need_calibration else None
            return bytes(work.quantize(ranges).quantized_model)

    def _ranges(self, work: Any, source: Path, split: Split) -> dict[str, Any]:
        """Range of every tensor on the calibration samples."""
        from ai_edge_quantizer.utils import qsv_utils

        (signature, names), *_ = interpreter(source.read_bytes(), source.name).get_signature_list().items()
        (name,) = names["inputs"]
        some = range(min(self.samples, len(split)))
        samples = [{name: split.floats(slice(i, i + 1)).numpy()} for i in some]
        if self.ranges == "moving":
            return dict(work.calibrate({signature: samples}, num_threads=1))
        found: dict[str, Any] = {}
        for sample in samples:
            for tensor, seen in work.calibrate({signature: [sample]}, num_threads=1).items():
                found[tensor] = qsv_utils.min_max_update(found[tensor], seen) if tensor in found else seen
        return found


def _weights(made: Any) -> tuple[int, int]:
    """(layers with int8 weights, layers with weights)."""
    kinds = {tensor["index"]: str(tensor["dtype"].__name__) for tensor in made.get_tensor_details()}
    operators = made._get_ops_details()
    # Where activations are float, the stored integers are made floats again by an operator before the layer.
    stored = {op["outputs"][0]: op["inputs"][0] for op in operators if op["op_name"] == "DEQUANTIZE"}
    layers = [op["inputs"][1] for op in operators if op["op_name"] in WEIGHTED]
    return sum(kinds[stored.get(index, index)] == "int8" for index in layers), len(layers)
