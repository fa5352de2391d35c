"""PyTorch without a compiler: the reference that a purifier trained, or the same graph from a .pt2 file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from secure_export.archives import opened, unpickled
from secure_export.errors import CompressError
from secure_export.quiet import quiet
from secure_export.records.memory import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import check_head, read
from secure_export.runtimes._cpu import cpu
from secure_export.runtimes._graph import input_shape, is_dynamic, split_at_head, unrounded
from secure_export.words import first_line

BATCH_SIZE = 256
OURS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_(format|version)|byteorder|\.data/\w+"
)
"""Members of the .pt2 files that this package writes; others can hold code."""


class TorchEager(Runtime):
    """Operator by operator on the CPU.

    torch.export.load is no parser for a stranger's file. Files with members that this package does not write,
    or whose pickles would import anything, are refused; open only a file whose digest is known all the same.
    """

    batch_size: int = Field(BATCH_SIZE, ge=1, description="samples per forward pass")

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no readable .pt2.
            LoadError: a damaged archive, or one that could run code.
        """
        return from_module(program(path), self.batch_size)

    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer [N, D], weight [K, D] and bias [K], dequantized, from the graph in the file.

        Raises:
            CompressError: no readable .pt2, or its logits do not come from a Linear or 1x1 Conv.
            LoadError: as `open`.
        """
        whole = program(path)
        body, weight, bias = split_at_head(whole, path.name)
        hidden = from_module(body, self.batch_size)

        def latents(inputs: Tensor) -> Tensor:
            values = hidden(inputs)
            return values.flatten(2).mean(2) if values.ndim == 4 else values

        noise = torch.rand((8, *input_shape(whole)), generator=torch.Generator().manual_seed(0))
        logits = from_module(unrounded(whole), self.batch_size)(noise)
        # Data rounded on the fly is off by up to 1/254 of its range.
        check_head(latents(noise) @ weight.T + bias, logits, 0.05 if is_dynamic(whole) else 1e-3, path.name)
        return View(setting, latents, weight, bias, twin=whole)

    def twin(self, path: Path) -> Predictor:
        """The graph in the file.

        Raises:
            CompressError, LoadError: as `open`.
        """
        return program(path)

    def environment(self) -> Mapping[str, str]:
        """Version, threads and batch size, and the CPU."""
        return {
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "batch_size": str(self.batch_size),
            "cpu": cpu(),
        }


def from_module(model: nn.Module, batch_size: int = BATCH_SIZE) -> Predictor:
    """`model` (left in the mode it is in) as a Predictor: batches, no gradients, float32 out."""

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        return torch.cat([model(batch.float()).float() for batch in torch.split(inputs, batch_size)])

    return predict


def program(path: Path) -> torch.fx.GraphModule:
    """The graph of a .pt2 file that this package wrote.

    Raises:
        CompressError: it cannot be read, or is no exported program of this torch.
        LoadError: a damaged archive, or one that could run code.
    """
    with quiet():
        import torchao  # noqa: F401 - registers the tensor types of quantized weights

    content = read(path)
    archive = opened(content, path.name)
    for member in archive.members:
        if not OURS.fullmatch(member):
            raise CompressError(f"{path.name} holds {member}, which this package does not write")
        part = archive.read(member)
        if part.startswith(b"PK") or member.endswith(".pt"):
            unpickled(part, f"{path.name}: {member}")
    try:
        loaded = torch.export.load(io.BytesIO(content)).module()
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CompressError(f"{path.name} is no exported program: {first_line(error)}") from error
    return loaded
