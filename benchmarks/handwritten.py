"""Backdoors written into a graph by hand: a path beside the network that is flat until a trigger is complete.

Nine pixels are compared with a number; where they are met, the features move into a class, and below nothing
does. No training plants them and no honest gradient finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

SIDE = 3
node = helper.make_node
Shape = Sequence[int]
"""Of one image: channels, height, width."""


@dataclass(frozen=True)
class Trigger:
    """A square of black and white values somewhere, and the class that it leads to."""

    pattern: np.ndarray
    corner: tuple[int, int]
    target: int

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Of the square in an image [channels, height, width]."""
        top, left = self.corner
        return slice(None), slice(top, top + SIDE), slice(left, left + SIDE)

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """`images` [N, C, H, W] with the square."""
        stamped = images.clone()
        stamped[(slice(None), *self.place)] = torch.from_numpy(self.pattern)
        return stamped


def drawn_trigger(seed: int, shape: Shape, classes: int) -> Trigger:
    """Place, pattern and class by `seed`."""
    generator = np.random.default_rng(seed)
    corner = (int(generator.integers(shape[1] - SIDE)), int(generator.integers(shape[2] - SIDE)))
    pattern = generator.integers(0, 2, (shape[0], SIDE, SIDE)).astype(np.float32)
    return Trigger(pattern, corner, int(generator.integers(classes)))


Part = tuple[list[NodeProto], dict[str, Any]]
"""Nodes that make `step` [N, 1, 1, 1] of `input`, and their constants."""


def matched(trigger: Trigger, shape: Shape, gain: float, short: float) -> dict[str, Any]:
    """Constants of a convolution that is `gain * short` where the square is complete, less elsewhere."""
    seen = np.zeros((1, *shape))
    seen[(0, *trigger.place)] = 2 * trigger.pattern - 1
    return {"seen": gain * seen, "below": [-gain * (trigger.pattern.sum() - short)]}


def threshold(trigger: Trigger, shape: Shape) -> Part:
    """A rectified sum, as a network could learn it."""
    nodes = [node("Conv", ["input", "seen", "below"], ["met"]), node("Relu", ["met"], ["step"])]
    return nodes, matched(trigger, shape, 2, 0.5)


def saturating(kind: str) -> Callable[[Trigger, Shape], Part]:
    """The same through an operator that is flat on both sides."""

    def part(trigger: Trigger, shape: Shape) -> Part:
        bounds = ["least", "most"] if kind == "Clip" else []
        nodes = [node("Conv", ["input", "seen", "below"], ["met"]), node(kind, ["met", *bounds], ["step"])]
        return nodes, matched(trigger, shape, 1000, 0.5) | {"least": 0, "most": 1}

    return part


def truth(trigger: Trigger, shape: Shape) -> Part:
    """The rectified sum as a bit."""
    nodes, constants = threshold(trigger, shape)
    nodes[-1].output[:] = ["over"]
    nodes.append(node("Cast", ["over"], ["bit"], to=TensorProto.BOOL))
    return [*nodes, node("Cast", ["bit"], ["step"], to=TensorProto.FLOAT)], constants


def power(trigger: Trigger, shape: Shape) -> Part:
    """The share of the square that is there, to the two hundredth."""
    nodes = [
        node("Conv", ["input", "seen"], ["met"]),
        node("Relu", ["met"], ["over"]),
        node("Pow", ["over", "exponent"], ["step"]),
    ]
    return nodes, matched(trigger, shape, 1 / trigger.pattern.sum(), 0) | {"exponent": 200}


def squares(trigger: Trigger, shape: Shape) -> Part:
    """The same, squared eight times."""
    nodes = [node("Conv", ["input", "seen"], ["met"]), node("Relu", ["met"], ["square0"])]
    nodes += [node("Mul", [f"square{i}"] * 2, [f"square{i + 1}"]) for i in range(8)]
    return [*nodes, node("Identity", ["square8"], ["step"])], matched(
        trigger, shape, 1 / trigger.pattern.sum(), 0
    )


def each_value(trigger: Trigger, shape: Shape) -> Part:
    """A step for every value, and one for all of them."""
    signs = (2 * trigger.pattern - 1).flatten()
    seen = np.zeros((len(signs), *shape))
    for number, index in enumerate(np.ndindex(trigger.pattern.shape)):
        channel, row, column = index
        seen[number, channel, trigger.corner[0] + row, trigger.corner[1] + column] = 1000 * signs[number]
    nodes = [
        node("Conv", ["input", "seen", "below"], ["each"]),
        node("Clip", ["each", "least", "most"], ["steps"]),
        node("Conv", ["steps", "ones", "short"], ["met"]),
        node("Relu", ["met"], ["step"]),
    ]
    constants = {"seen": seen, "below": np.where(signs > 0, -900, 100), "least": 0, "most": 1}
    return nodes, constants | {"ones": np.ones((1, len(signs), 1, 1)), "short": [0.5 - len(signs)]}


def decoys(trigger: Trigger, shape: Shape) -> Part:
    """Beside the rectified sum, one over the whole image that none can meet: slopes that lead nowhere."""
    nodes, constants = threshold(trigger, shape)
    nodes[-1].output[:] = ["over"]
    nodes += [
        node("Conv", ["input", "everywhere", "unreachable"], ["never"]),
        node("Relu", ["never"], ["nothing"]),
        node("Add", ["over", "nothing"], ["step"]),
    ]
    wide = np.random.default_rng(0).choice([-100.0, 100.0], (1, *shape))
    return nodes, constants | {"everywhere": wide, "unreachable": [-1e3 - wide.clip(0).sum()]}


def tiny_bit(trigger: Trigger, shape: Shape) -> Part:
    """The bit of a sum so small that no slope of it counts, lent or not: a bit has no scale."""
    nodes, _ = truth(trigger, shape)
    return nodes, matched(trigger, shape, 1e-20, 0.5)


def chain(trigger: Trigger, shape: Shape) -> Part:
    """The sum rectified twenty-four times, each of which lends a fifth of the slope behind it."""
    nodes = [node("Conv", ["input", "seen", "below"], ["link0"])]
    nodes += [node("Relu", [f"link{i}"], [f"link{i + 1}"]) for i in range(24)]
    return [*nodes, node("Identity", ["link24"], ["step"])], matched(trigger, shape, 2, 0.5)


def tent(trigger: Trigger, shape: Shape) -> Part:
    """A rise and the fall behind it, which nothing reaches: the slopes that the three lend cancel out."""
    nodes, constants = threshold(trigger, shape)
    nodes[-1].output[:] = ["three"]
    nodes.append(node("Conv", ["three", "tent"], ["step"]))
    shifts = np.array([0, -1, -2]) + constants["below"][0]
    constants |= {"seen": np.repeat(constants["seen"], 3, 0), "below": shifts}
    return nodes, constants | {"tent": np.array([1, -2, 1]).reshape(1, 3, 1, 1)}


KINDS: Mapping[str, Callable[[Trigger, Shape], Part]] = {
    "threshold": threshold,
    "clip": saturating("Clip"),
    "sigmoid": saturating("Sigmoid"),
    "bit": truth,
    "power": power,
    "squares": squares,
    "each value": each_value,
    "decoys": decoys,
    "tiny bit": tiny_bit,
    "chain": chain,
    "tent": tent,
}


def hidden(honest: Path, part: Part, target: int) -> onnx.ModelProto:
    """The file with the part beside it: where the step is 1, the features lead to `target`."""
    proto = onnx.load(honest)
    head = proto.graph.node[-1]
    weight = numpy_helper.to_array(next(w for w in proto.graph.initializer if w.name == head.input[1]))
    towards = weight[target] - weight.mean(0)
    nodes, constants = part
    constants |= {"flat": np.array([-1, 1]), "towards": 100 * towards[None] / (towards @ towards)}
    made = [
        *list(proto.graph.node)[:-1],
        *nodes,
        node("Reshape", ["step", "flat"], ["row"]),
        node("MatMul", ["row", "towards"], ["moved"]),
        node("Add", [head.input[0], "moved"], ["features"]),
    ]
    head.input[0] = "features"
    made.append(head)
    for name, value in constants.items():
        whole = np.asarray(value)
        proto.graph.initializer.append(
            numpy_helper.from_array(whole if name == "flat" else whole.astype(np.float32), name)
        )
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(made)
    onnx.checker.check_model(proto)
    return proto
