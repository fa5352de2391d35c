"""Triggers that can be searched for: what stays of an input, what comes on top, where pixels come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from secure_export.records.memory import Split

FEWEST_POSITIONS = 4.0


@dataclass(frozen=True)
class Perturbation:
    """R universal perturbations: clamp(keep · warp(x, flow) + kernel * x + add, 0, 1)."""

    keep: Tensor
    """[R, 1, ...]: share of the input that stays."""
    add: Tensor
    """[R, ...] in units of the [0, 1] input range."""
    flow: Tensor | None = None
    """[R, H, W, 2] in units of grid_sample (the side is 2), (column, row); None moves nothing."""
    kernel: Tensor | None = None
    """[R, C, C, k, ...]: what neighbours and channels add to a value; odd k; None adds nothing."""

    def __len__(self) -> int:
        return len(self.add)

    def stamp(self, inputs: Tensor, which: Tensor) -> Tensor:
        """Inputs [N, ...] in [0, 1], each with perturbation number `which` [N]."""
        moved = inputs if self.flow is None else warped(inputs, self.flow[which])
        made = moved * self.keep[which] + self.add[which]
        return (made if self.kernel is None else made + filtered(inputs, self.kernel[which])).clamp(0, 1)


class _Stepped(torch.autograd.Function):
    """Values in [0, 1] on the 256 steps of a byte, gradients straight through."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.mul(255).round_().div_(255)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def as_samples(inputs: Tensor, split: Split) -> Tensor:
    """Inputs [N, ...] in [0, 1] with values that the samples of `split` can have: a byte's, or any.

    A file can tell whether every value is one that an image has, and sleep where one is not.
    """
    if split.inputs.is_floating_point():
        return inputs
    made: Tensor = _Stepped.apply(inputs)
    return made


def spatial(shape: torch.Size) -> torch.Size:
    """The axes that positions lie on: all but the channels, or the only one there is."""
    return shape[1:] if len(shape) > 1 else shape


def untouched(count: int, shape: torch.Size) -> Tensor:
    """`keep` of perturbations that cover nothing."""
    return torch.ones(count, *(1,) * (len(shape) > 1), *spatial(shape))


def patch(place: Tensor, value: Tensor, mass: float) -> Perturbation:
    """Mask and pattern of `mass` positions, from logits [R, positions] and [R, ...].

    As Neural Cleanse (Wang et al. 2019, eq. 2), the mask's mass bounded instead of penalized.
    """
    shape = value.shape[1:]
    share = torch.softmax(place.flatten(1), 1) * max(mass, FEWEST_POSITIONS)
    mask = share.clamp(max=1).view_as(untouched(len(value), shape))
    return Perturbation(1 - mask, mask * torch.sigmoid(value))


def in_ball(value: Tensor, radius: float) -> Perturbation:
    """Additive, of Euclidean norm `radius`."""
    length = value.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (value.ndim - 1))
    return Perturbation(untouched(len(value), value.shape[1:]), value * radius / length)


def in_box(value: Tensor, epsilon: float) -> Perturbation:
    """Additive, each value within +-epsilon."""
    return Perturbation(untouched(len(value), value.shape[1:]), epsilon * torch.tanh(value))


def slow_waves(axes: torch.Size, fastest: float) -> Tensor:
    """Flat indices into a grid's half spectrum: waves of at most `fastest` periods a position on any axis."""
    return (_speeds(axes) <= fastest).nonzero().flatten()


def slowest_waves(axes: torch.Size, fastest: float, count: int) -> Tensor:
    """Places in slow_waves() of the `count` slowest, or of all there are."""
    return _speeds(axes)[slow_waves(axes, fastest)].argsort(stable=True)[:count]


def _speeds(axes: torch.Size) -> Tensor:
    grids = [torch.fft.fftfreq(n) for n in axes[:-1]] + [torch.fft.rfftfreq(axes[-1])]
    return torch.stack(torch.meshgrid(*grids, indexing="ij")).abs().amax(0).flatten()


def waves(share: Tensor, turn: Tensor, axes: torch.Size, fastest: float) -> Tensor:
    """[R, C, ...] sums of the slow waves of a grid, within +-1.

    The softmax of `share` [R, W] deals one unit of amplitude out to the waves; `turn` [R, C, W, 2], cut to
    length 1, says where a wave begins in a channel and how strong it is there.
    """
    length = turn.square().sum(-1, keepdim=True).clamp(min=1).sqrt()
    slow = torch.view_as_complex(turn / length) * torch.softmax(share, 1)[:, None]
    half = torch.Size([*axes[:-1], axes[-1] // 2 + 1])
    # The half that is left out mirrors this one, but for the columns that are their own mirror.
    own = torch.tensor([0] if axes[-1] % 2 else [0, half[-1] - 1])
    weight = torch.full(half, 0.5).index_fill(-1, own, 1.0).flatten()
    index = slow_waves(axes, fastest)
    spectrum = torch.zeros(*turn.shape[:2], half.numel(), dtype=slow.dtype)
    spectrum = spectrum.index_copy(2, index, slow * weight[index]).view(*turn.shape[:2], *half)
    made: Tensor = torch.fft.irfftn(spectrum, s=axes, norm="forward")
    return made


def enlarged(coarse: Tensor, size: torch.Size) -> Tensor:
    """[R, C, ...] at a coarse resolution, smoothly brought to `size` (one or two axes)."""
    if len(size) == 1:
        return F.interpolate(coarse, size=size, mode="linear", align_corners=True)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(
        coarse.min().item(), coarse.max().item()
    )


def warped(inputs: Tensor, flow: Tensor) -> Tensor:
    """Images [N, C, H, W] or signals [N, C, T], [N, T]; values come from where `flow` [N, H, W, 2] points."""
    images = inputs
    if inputs.ndim == 2:
        images = inputs[:, None, None]
    elif inputs.ndim == 3:
        images = inputs[:, :, None]
    height, width = images.shape[2:]
    rows = torch.linspace(-1, 1, height) if height > 1 else torch.zeros(1)
    columns = torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    moved = F.grid_sample(images, identity + flow, padding_mode="border", align_corners=True)
    return moved.view_as(inputs)


def filtered(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Inputs [N, C, H, W], [N, C, T] or [N, T], each convolved with its own `kernel` [N, C, C, k, ...].

    At the border the last value is repeated.
    """
    channels = inputs if kernel.ndim == inputs.ndim + 1 else inputs[:, None]
    if not len(inputs):
        return inputs
    side = kernel.shape[-1] // 2
    padded = F.pad(channels, [side] * 2 * (channels.ndim - 2), mode="replicate")
    convolve = F.conv1d if channels.ndim == 3 else F.conv2d
    made = convolve(padded.flatten(0, 1)[None], kernel.flatten(0, 1), groups=len(inputs))
    return made.view_as(inputs)
