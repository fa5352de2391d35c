"""PyTorch's exported program (.pt2): the eager reference as a file.

Opening a .pt2 runs code if its author wants it to (torch.export.load unpickles the sample inputs), so this
format is for files that travel with a digest; as an input it is read member by member elsewhere.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.export import Dim, ExportedProgram

from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.quiet import quiet
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


class Pt2(Format):
    """One .pt2 file with a free batch axis, without stack traces and without samples of anybody's data."""

    suffix: ClassVar[str] = ".pt2"
    runtime: ClassVar[str] = "torch-eager"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`.

        Raises:
            CompressError: torch.export cannot trace it with a free batch axis.
        """
        program = exported(model, example)
        # A path would lend its name to the archive's members; a buffer gives every file the same.
        buffer = io.BytesIO()
        with quiet():
            torch.export.save(program, buffer)
        path.write_bytes(buffer.getvalue())


def exported(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model as a graph, its file names and line numbers forgotten.

    Raises:
        CompressError: torch.export cannot trace it with a free batch axis.
    """
    # The archive embeds its example (of a view the whole tensor behind it), so it gets zeros; two of them,
    # because torch.export specialises on a batch of one.
    zeros = torch.zeros(2, *example.shape[1:])
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, (zeros,), dynamic_shapes=({0: Dim("batch", min=1)},))
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise CompressError(
                f"cannot export to .pt2: {reason}",
                hint="the model must be traceable by torch.export with a free batch axis",
            ) from error
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)
    return program
