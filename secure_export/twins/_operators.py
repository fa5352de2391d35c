"""ONNX operators as differentiable torch functions of (operands, attributes)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Values = list[Any]
"""Operands; an optional one that is absent is None."""
Attributes = dict[str, Any]
Operator = Callable[[Values, Attributes], Any]

RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
CASTS = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16}


def _pads(operands: Values, attributes: Attributes, spatial: int, value: float = 0.0) -> tuple[Tensor, Any]:
    """The data and symmetric padding; uneven padding is done beforehand."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", ""):
        raise ValueError("automatic padding")
    pads = list(attributes.get("pads", [0] * 2 * spatial))
    before, after = pads[:spatial], pads[spatial:]
    if before == after:
        return operands[0], before
    order = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
    return F.pad(operands[0], order, value=value), [0] * spatial


def _conv(operands: Values, attributes: Attributes) -> Tensor:
    weight = operands[1]
    spatial = weight.ndim - 2
    data, padding = _pads(operands, attributes, spatial)
    bias = operands[2] if len(operands) > 2 else None
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    made: Tensor = run(
        data,
        weight,
        bias,
        attributes.get("strides", [1] * spatial),
        padding,
        attributes.get("dilations", [1] * spatial),
        attributes.get("group", 1),
    )
    return made


def _gemm(operands: Values, attributes: Attributes) -> Tensor:
    left = operands[0].T if attributes.get("transA") else operands[0]
    right = operands[1].T if attributes.get("transB") else operands[1]
    made: Tensor = attributes.get("alpha", 1.0) * (left @ right)
    if len(operands) > 2 and operands[2] is not None:
        made = made + attributes.get("beta", 1.0) * operands[2]
    return made


def _pool(kind: str) -> Operator:
    def run(operands: Values, attributes: Attributes) -> Tensor:
        size = attributes["kernel_shape"]
        fill = -math.inf if kind == "max" else 0.0
        data, padding = _pads(operands, attributes, len(size), fill)
        if kind == "average" and (attributes.get("ceil_mode") or data is not operands[0]):
            raise ValueError("an average over a window that is not whole, which runtimes divide differently")
        strides = attributes.get("strides", [1] * len(size))
        ceil = bool(attributes.get("ceil_mode", 0))
        if kind == "max":
            pool: Any = (F.max_pool1d, F.max_pool2d)[len(size) - 1]
            made: Tensor = pool(data, size, strides, padding, attributes.get("dilations", 1), ceil)
            return made
        pool = (F.avg_pool1d, F.avg_pool2d)[len(size) - 1]
        made = pool(data, size, strides, padding, ceil, bool(attributes.get("count_include_pad", 0)))
        return made

    return run


def _axes(operands: Values, attributes: Attributes) -> list[int] | None:
    if len(operands) > 1 and operands[1] is not None:
        return [int(axis) for axis in operands[1].reshape(-1)]
    axes = attributes.get("axes")
    return None if axes is None else list(axes)


def _reduce_mean(operands: Values, attributes: Attributes) -> Tensor:
    axes = _axes(operands, attributes) or list(range(operands[0].ndim))
    made: Tensor = operands[0].mean(axes, keepdim=bool(attributes.get("keepdims", 1)))
    return made


def _squeeze(operands: Values, attributes: Attributes) -> Tensor:
    axes = _axes(operands, attributes)
    made: Tensor = operands[0].squeeze() if axes is None else operands[0].squeeze(axes)
    return made


def _unsqueeze(operands: Values, attributes: Attributes) -> Tensor:
    made: Tensor = operands[0]
    for axis in sorted(_axes(operands, attributes) or []):
        made = made.unsqueeze(axis)
    return made


def _reshape(operands: Values, attributes: Attributes) -> Tensor:
    shape = [int(side) for side in operands[1]]
    if not attributes.get("allowzero"):
        shape = [operands[0].shape[i] if side == 0 else side for i, side in enumerate(shape)]
    made: Tensor = operands[0].reshape(shape)
    return made


def _expand(operands: Values, _: Attributes) -> Tensor:
    wanted = [int(side) for side in operands[1]]
    short = operands[0].ndim - len(wanted)  # Both ways: a size of 1 in either gives way.
    wanted = [1] * short + wanted
    sides = [1] * -short + list(operands[0].shape)
    made: Tensor = operands[0].expand([max(pair) for pair in zip(wanted, sides, strict=True)])
    return made


def _slice(operands: Values, _: Attributes) -> Tensor:
    data, starts, ends, *others = operands
    axes, steps = [*others, None, None][:2]
    axes = range(len(starts)) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    taken = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps, strict=True):
        taken[axis] = slice(start, end, step)
    made: Tensor = data[tuple(taken)]
    return made


def _div(operands: Values, _: Attributes) -> Tensor:
    over, under = operands
    whole = not (over.is_floating_point() or under.is_floating_point())
    return torch.div(over, under, rounding_mode="trunc" if whole else None)


def _gather(operands: Values, attributes: Attributes) -> Tensor:
    data, index = operands[:2]
    axis = attributes.get("axis", 0) % data.ndim
    taken: Tensor = data.index_select(axis, index.reshape(-1).long() % data.shape[axis])
    return taken.reshape([*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]])


def _clip(operands: Values, attributes: Attributes) -> Tensor:
    low = operands[1] if len(operands) > 1 else attributes.get("min")
    high = operands[2] if len(operands) > 2 else attributes.get("max")
    made: Tensor = operands[0].clamp(
        None if low is None else float(low), None if high is None else float(high)
    )
    return made


def _batch_norm(operands: Values, attributes: Attributes) -> Tensor:
    data, weight, bias, mean, var = operands[:5]
    return F.batch_norm(data, mean, var, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _layer_norm(operands: Values, attributes: Attributes) -> Tensor:
    data = operands[0]
    shape = data.shape[attributes.get("axis", -1) :]
    bias = operands[2] if len(operands) > 2 else None
    return F.layer_norm(data, shape, operands[1], bias, attributes.get("epsilon", 1e-5))


def _along(parameter: Tensor, data: Tensor, axis: int) -> Tensor:
    """A scale or zero point per channel, broadcastable to `data`."""
    if parameter.ndim == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * data.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def _straight(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, `exact` in gradient."""
    return exact + (rounded - exact).detach()


def _quantize(operands: Values, attributes: Attributes) -> Tensor:
    """Codes as floats, so that a gradient can pass."""
    data, axis = operands[0], attributes.get("axis", 1)
    zero = (
        operands[2] if len(operands) > 2 and operands[2] is not None else torch.tensor(0, dtype=torch.uint8)
    )
    low, high = RANGES[zero.dtype]
    if not bool((operands[1] > 0).all()):
        raise ValueError("a scale that is not positive")
    scaled = data / _along(operands[1], data, axis)
    return (_straight(scaled, scaled.round()) + _along(zero, data, axis).float()).clamp(low, high)


class _Rounded(torch.autograd.Function):
    """_quantize and then _dequantize on one grid, in place: a search spends much of its time here."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, scale: float, low: int, high: int) -> Tensor:
        codes = (data.float() / scale).round_()
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def one_grid(grid: Sequence[Tensor | None]) -> bool:
    """Whether (scale, zero point) are both there, one number for all values, of a type known here."""
    numbers = [part for part in grid if part is not None and part.numel() == 1]
    return len(grid) == len(numbers) == 2 and numbers[1].dtype in RANGES


def rounded(operands: Values, _: Attributes) -> Tensor:
    """A value quantized and dequantized by one scale and zero point."""
    data, scale, zero = operands
    if not float(scale) > 0:
        raise ValueError("a scale that is not positive")
    low, high = RANGES[zero.dtype]
    return straight_rounded(data, float(scale), low - int(zero), high - int(zero))


def straight_rounded(data: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Multiples of `scale` from `low` to `high`; one function, so that a torch function mode sees it."""
    if has_torch_function((data,)):
        made: Tensor = handle_torch_function(straight_rounded, (data,), data, scale, low, high)
    else:
        made = _Rounded.apply(data, scale, low, high)
    return made


def hard_step(data: Tensor) -> Tensor:
    """1 where there is something, else 0, as floats; one function, so that a torch function mode sees it."""
    if has_torch_function((data,)):
        made: Tensor = handle_torch_function(hard_step, (data,), data)
        return made
    return (data != 0).to(data.dtype)


def _dequantize(operands: Values, attributes: Attributes) -> Tensor:
    data: Tensor = operands[0].float()
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    if block:  # one scale for every `block` values along the axis
        spread = [part.repeat_interleave(block, axis) for part in operands[1:] if part is not None]
        scale, *zero = [part.narrow(axis, 0, data.shape[axis]) for part in spread]
        made: Tensor = (data - zero[0].float() if zero else data) * scale
        return made
    if len(operands) > 2 and operands[2] is not None:
        data = data - _along(operands[2], data, axis).float()
    return data * _along(operands[1], data, axis)


def _dynamic_quantize(operands: Values, _: Attributes) -> tuple[Tensor, Tensor, Tensor]:
    data = operands[0]
    low, high = data.detach().min().clamp(max=0), data.detach().max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, 255)
    scaled = data / scale
    return (_straight(scaled, scaled.round()) + zero).clamp(0, 255), scale, zero


def _centred(operands: Values) -> tuple[Tensor, Tensor]:
    """Data and weight of an integer operator, zero points taken off."""
    data, weight = operands[0].float(), operands[1].float()
    if len(operands) > 2 and operands[2] is not None:
        data = data - operands[2].float()
    if len(operands) > 3 and operands[3] is not None:
        weight = weight - operands[3].float()
    return data, weight


def _conv_integer(operands: Values, attributes: Attributes) -> Tensor:
    data, weight = _centred(operands)
    return _conv([data, weight], attributes)


def _matmul_integer(operands: Values, _: Attributes) -> Tensor:
    data, weight = _centred(operands)
    return data @ weight


def _cast(operands: Values, attributes: Attributes) -> Tensor:
    kind = CASTS[attributes["to"]]
    data: Tensor = operands[0]
    if not data.is_floating_point():
        return data.to(kind)
    if kind is torch.bool:
        return hard_step(data)
    # Codes of integer operators travel as floats here: a cast to integers cuts off, and passes gradients.
    return data if kind.is_floating_point else data + (data.trunc() - data).detach()


def _simple(run: Callable[..., Tensor]) -> Operator:
    return lambda operands, _: run(*operands)


OPERATORS: dict[str, Operator] = {
    "Add": _simple(torch.add),
    "AveragePool": _pool("average"),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda operands, a: torch.cat(operands, a["axis"]),
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Dropout": lambda operands, _: operands[0],
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Erf": _simple(torch.erf),
    "Exp": _simple(torch.exp),
    "Expand": _expand,
    "Flatten": lambda operands, a: operands[0].flatten(a.get("axis", 1)),
    "Gather": _gather,
    "Gelu": lambda operands, a: F.gelu(operands[0], approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda operands, _: operands[0].mean(list(range(2, operands[0].ndim)), keepdim=True),
    "HardSigmoid": lambda operands, a: (operands[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _simple(F.hardswish),
    "Identity": lambda operands, _: operands[0],
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda operands, a: F.leaky_relu(operands[0], a.get("alpha", 0.01)),
    "MatMul": _simple(torch.matmul),
    "MatMulInteger": _matmul_integer,
    "MaxPool": _pool("max"),
    "Mul": _simple(torch.mul),
    "Neg": _simple(torch.neg),
    "Pow": _simple(torch.pow),
    "QuantizeLinear": _quantize,
    "Range": lambda operands, _: torch.arange(*(operand.item() for operand in operands)),
    "ReduceMean": _reduce_mean,
    "Relu": _simple(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda operands, a: torch.tensor(operands[0].shape[a.get("start", 0) : a.get("end")]),
    "Sigmoid": _simple(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda operands, a: operands[0].softmax(a.get("axis", -1)),
    "Sqrt": _simple(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _simple(torch.sub),
    "Tanh": _simple(torch.tanh),
    "Transpose": lambda operands, a: operands[0].permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""By ONNX name."""
