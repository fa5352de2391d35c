"""Slopes where a network has none: a trigger behind a hard step lies beyond a plateau without gradients.

Backward pass differentiable approximation (Athalye et al. 2018): values stay what they are, and whatever is
flat borrows the slope of a stand-in. For searches alone; what is found is counted by the file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., Tensor]

STEEPNESS = 0.2
"""Of the line that stands in for what goes flat. What is steeper keeps its own slope."""
FLAT_SOMEWHERE = (
    "clamp clamp_max clamp_min clip elu erf exp gelu hard_step hardsigmoid hardswish hardtanh leaky_relu "
    "mish relu relu6 selu sigmoid silu softmax softplus straight_rounded tanh"
)


def _line(value: Tensor, *_: Any, **__: Any) -> Tensor:
    return STEEPNESS * value


def _tangent_at_one(value: Tensor, exponent: float, **_: Any) -> Tensor:
    return value * exponent


def _averaged(value: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, **more: Any) -> Tensor:
    pool: Any = F.avg_pool1d if value.ndim == 3 else F.avg_pool2d
    made: Tensor = pool(value, kernel_size, stride or None, padding, bool(more.get("ceil_mode")))
    return STEEPNESS * made


STAND_INS: Mapping[str, Function] = {
    **dict.fromkeys(FLAT_SOMEWHERE.split(), _line),
    "max_pool1d": _averaged,
    "max_pool2d": _averaged,
    "mul": torch.add,  # of two values that both move: repeated squares of what is small are flat, too
    "pow": _tangent_at_one,
}
"""By the name of a torch function; `hard_step` and `straight_rounded` are those of twins."""


class _Lent(torch.autograd.Function):
    """The value of `run`; for each of `given` its own gradient, or the stand-in's where that is steeper."""

    @staticmethod
    def forward(ctx: Any, run: Function, stand_in: Function, *given: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.given = [value.detach().requires_grad_(True) for value in given]
            ctx.made, ctx.stand_in = run(*ctx.given), stand_in
        made: Tensor = ctx.made.detach()
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: Any = [torch.zeros_like(value) for value in ctx.given]
        if ctx.made.requires_grad:
            own = torch.autograd.grad(ctx.made, ctx.given, gradients[0])
        with torch.enable_grad():
            other = ctx.stand_in(*ctx.given)
        lent = torch.autograd.grad(other, ctx.given, gradients[0])
        return None, None, *(torch.where(a.abs() < b.abs(), b, a) for a, b in zip(own, lent, strict=True))


class Surrogates(TorchFunctionMode):
    """While it is on, STAND_INS lend their slopes to what is computed with gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stand_in = STAND_INS.get(func.__name__.partition(".")[0].strip("_"))
        moving = [i for i, one in enumerate(args) if isinstance(one, Tensor) and one.requires_grad]
        fewest = 2 if stand_in is torch.add else 1
        if stand_in is None or len(moving) < fewest or not torch.is_grad_enabled():
            return func(*args, **kwargs)

        def filled(values: tuple[Tensor, ...]) -> list[Any]:
            """The arguments, with copies of `values`: some functions write to what they are given."""
            given = list(args)
            for place, value in zip(moving, values, strict=True):
                given[place] = value.clone()
            return given

        return _Lent.apply(
            lambda *values: func(*filled(values), **kwargs),
            lambda *values: stand_in(*filled(values), **kwargs),
            *(args[place] for place in moving),
        )


def with_surrogates(logits: Function) -> Function:
    """`logits` as they are, with a slope also where they are flat."""

    def run(inputs: Tensor) -> Tensor:
        with Surrogates():
            return logits(inputs)

    return run
