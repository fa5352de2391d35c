"""A .tflite file: without the names of its author's modules, and in LiteRT's interpreter."""

from __future__ import annotations

from typing import Any

from secure_export.errors import CompressError
from secure_export.quiet import quiet, silent_stderr
from secure_export.words import first_line, printable

MAGIC = b"TFL3"
"""At byte 4 of every .tflite file."""


def renamed(content: bytes) -> bytes:
    """The same file, its tensors named by their places: as converted they name its author's modules."""
    with quiet(), silent_stderr():
        from ai_edge_litert.tools import flatbuffer_utils as flat

        model = flat.read_model_from_bytearray(bytearray(content))
        for graph in model.subgraphs:
            for place, tensor in enumerate(graph.tensors):
                tensor.name = f"tensor_{place}".encode()
        return bytes(flat.convert_object_to_bytearray(model))


def interpreter(content: bytes, file: str, *, threads: int = 1, every_value: bool = False) -> Any:
    """LiteRT's interpreter on the bytes of `file`; with `every_value` inner values can be read, more slowly.

    Raises:
        CompressError: no .tflite file, not one input and one output, or LiteRT cannot run it.
    """
    if content[4:8] != MAGIC:
        raise CompressError(f"{file} is no .tflite file")
    try:
        with quiet(), silent_stderr():
            from ai_edge_litert.interpreter import Interpreter, OpResolverType

            # XNNPACK takes whole stretches of the graph, whose inner values nobody else sees.
            plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            made = Interpreter(
                model_content=content,
                num_threads=threads,
                experimental_op_resolver_type=plain if every_value else OpResolverType.AUTO,
                experimental_preserve_all_tensors=every_value,
            )
            made.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        reason = printable(first_line(error))
        raise CompressError(f"LiteRT cannot open {file}: {reason}") from error
    inputs, outputs = made.get_input_details(), made.get_output_details()
    if len(inputs) != 1 or len(outputs) != 1:
        raise CompressError(
            f"{file} has {len(inputs)} inputs and {len(outputs)} outputs, expected one of each"
        )
    return made
