"""Custom: the user's own trigger, as a picture with a mask, an additive array, or a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, FilePath, model_validator

from secure_export.errors import DataError
from secure_export.factories import imported, local_code
from secure_export.triggers import Trigger
from secure_export.triggers._files import read_array, read_unit

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class Custom(Trigger):
    """Exactly one of `image` with `mask`, `additive`, `callable`.

    The function behind `callable` is local code that the user trusts and names: it runs. It takes float32
    inputs [N, ...] in [0, 1] and returns the same shape and range, the same for the same inputs.
    """

    example: ClassVar[Mapping[str, Any]] = {"callable": "torch:square"}

    image: FilePath | None = Field(None, description="pixels to stamp: a picture, or .npy in [0, 1]")
    mask: FilePath | None = Field(None, description="where and how strongly: a picture, or .npy in [0, 1]")
    additive: FilePath | None = Field(None, description=".npy to add, in units of the [0, 1] input range")
    callable: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="function on inputs, as package.module:function"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        ways = [self.image or self.mask, self.additive, self.callable]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of image with mask, additive, or callable")
        if (self.image is None) != (self.mask is None):
            raise ValueError("image and mask go together")
        return self

    def __call__(self, inputs: Tensor) -> Tensor:
        """Triggered copy of `inputs` in [0, 1]; sums are clipped.

        Raises:
            DataError: a file that cannot be read or does not fit the inputs, or a function that cannot be
                imported, fails, or returns something else than such inputs.
        """
        if self.callable is not None:
            function = imported(self.callable, DataError)
            with local_code(f"custom: {self.callable} failed", DataError):
                return _checked(self.callable, function(inputs.clone()), inputs)
        if self.additive is not None:
            return (inputs + _fitted(self.additive, read_array(self.additive), inputs)).clamp_(0, 1)
        if self.image is None or self.mask is None:
            raise DataError("custom: image and mask go together")
        image = _fitted(self.image, read_unit(self.image, inputs.shape[1]), inputs)
        mask = _fitted(self.mask, read_unit(self.mask, 1), inputs)
        return (inputs + mask * (image - inputs)).clamp_(0, 1)


def _fitted(path: Path, tensor: Tensor, inputs: Tensor) -> Tensor:
    """`tensor` on the inputs' device if it has their shape, one channel for all, or no channel axis.

    Nothing is resized: a patch of another size would be another trigger.
    """
    shape = tuple(inputs.shape[1:])
    if tuple(tensor.shape) not in {shape, (1, *shape[1:]), shape[1:]}:
        raise DataError(
            f"{path}: got shape {tuple(tensor.shape)}, expected {shape}, one channel of it or none",
            hint="make the file in the size of the model's inputs",
        )
    return tensor.to(inputs)


def _checked(name: str, outputs: object, inputs: Tensor) -> Tensor:
    if not isinstance(outputs, torch.Tensor):
        raise DataError(f"custom: {name} returned {type(outputs).__name__}, expected a tensor")
    if outputs.shape != inputs.shape or outputs.dtype != inputs.dtype:
        raise DataError(
            f"custom: {name} returned {outputs.dtype} {tuple(outputs.shape)}, "
            f"expected {inputs.dtype} {tuple(inputs.shape)}"
        )
    # Written so that NaN fails too.
    if not bool(((outputs >= 0) & (outputs <= 1)).all()):
        raise DataError(f"custom: {name} returned values outside [0, 1]", hint="clamp them in the function")
    return outputs
