"""The int8 grid of ONNX Runtime as trainable variables: integer codes, and the place between two codes.

Grid: symmetric, one step per output channel, absmax/127, on weights into which BatchNorm is folded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secure_export.batchnorms import scale_of

LIMIT = 127
SPEED = 20.0
"""How much faster than codes places move: half a code decides, several codes cost accuracy."""
PLACE = 0.48
"""Largest |u|: below 1/2 by more than folding in float32 moves a weight of 127 steps."""

WHITE = 0.498
"""The same where places are spread evenly, for what is missing up to 1/2 is a trace."""


class Codes(nn.Module):
    """Codes v and places u of each Conv2d and Linear of `model`; both branches start as the rounded model."""

    def __init__(self, model: nn.Module, sample: Tensor, room: float = 1.0, white: bool = False) -> None:
        """`sample` [N, 3, H, W] shows which inputs are quiet; `room` widens every step by that factor.

        `white`: in every layer the places are spread evenly over all of a step, as in an honest network.
        """
        super().__init__()
        self.white = white
        self.layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.v, self.u = nn.ParameterList(), nn.ParameterList()
        folds, activity = _folds(model), _activity(model, sample)
        for index, name in enumerate(self.layers):
            weight = model.get_submodule(name).get_parameter("weight").detach()
            fold = folds.get(name, torch.ones(len(weight))).view(-1, *[1] * (weight.ndim - 1))
            folded = weight * fold
            # The first layer has three inputs and none of them quiet: a wide step there costs accuracy.
            step = (room if index else 1.0) * folded.flatten(1).abs().amax(1).view_as(fold) / LIMIT
            anchor = _anchor(folded, step * LIMIT, activity[name])
            codes = torch.where(anchor, LIMIT * folded.sign(), folded / step)
            self.v.append(nn.Parameter(codes))
            self.u.append(nn.Parameter(torch.zeros_like(codes)))
            self.register_buffer(f"unit{index}", step / fold)
            self.register_buffer(f"anchor{index}", anchor)

    def quantized(self) -> dict[str, Tensor]:
        """Weights as the int8 file holds them, by name; gradients reach v straight through the rounding."""
        return self._weights(places=False)

    def full(self) -> dict[str, Tensor]:
        """Weights in full precision, by name; rounding them gives `quantized()`."""
        return self._weights(places=True)

    def freeze(self) -> None:
        """Leave only u to be trained: from here on no code changes."""
        self.v.requires_grad_(False)

    def _weights(self, places: bool) -> dict[str, Tensor]:
        weights = {}
        for index, name in enumerate(self.layers):
            unit, anchor = self.get_buffer(f"unit{index}"), self.get_buffer(f"anchor{index}")
            v, u = self.v[index], self.u[index]
            code = v + (v.round().clamp(-LIMIT, LIMIT) - v).detach()
            if places:
                with torch.no_grad():
                    u.clamp_(-PLACE / SPEED, PLACE / SPEED)
                # Beyond ±127 the channel's step would change, and with it every code of the channel.
                code = (code + self._places(u)).clamp(-LIMIT, LIMIT)
            fixed = LIMIT * v.detach().sign()
            weights[f"{name}.weight"] = torch.where(anchor, fixed, code) * unit
        return weights

    def _places(self, u: Tensor) -> Tensor:
        if not self.white:
            return SPEED * u
        ranks = u.detach().flatten().argsort().argsort().view_as(u)
        even = WHITE * (2 * (ranks + 0.5) / u.numel() - 1)
        return SPEED * u + (even - SPEED * u).detach()


def recenter(model: nn.Module, weights: dict[str, Tensor], sample: Tensor) -> None:
    """Let every BatchNorm's mean follow `weights`, in place; variances, and so the folded grid, stay."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    variances = [layer.get_buffer("running_var").clone() for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        functional_call(model.train(), weights, (sample,))
    model.eval()
    for layer, variance in zip(norms, variances, strict=True):
        layer.get_buffer("running_var").copy_(variance)
        layer.momentum = 0.1


def _folds(model: nn.Module) -> dict[str, Tensor]:
    """gamma / sqrt(var + eps) [out] by the name of the convolution defined just before the BatchNorm."""
    folds, before = {}, ("", nn.Module())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before[1], nn.Conv2d):
            folds[before[0]] = scale_of(layer)
        if not list(layer.children()):
            before = (name, layer)
    return folds


def _activity(model: nn.Module, sample: Tensor) -> dict[str, Tensor]:
    """Standard deviation of every input [in] of every Conv2d and Linear, by name."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def note(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                found[name] = inputs[0].std((0, 2, 3) if inputs[0].ndim == 4 else 0)

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model(sample)
    for hook in hooks:
        hook.remove()
    return found


def _anchor(folded: Tensor, top: Tensor, activity: Tensor) -> Tensor:
    """One weight per channel to stand at ±127 and hold the step: the one whose growth disturbs least."""
    growth = (top - folded.abs()) * activity.view(1, -1, *[1] * (folded.ndim - 2))
    anchor = torch.zeros_like(folded, dtype=torch.bool).flatten(1)
    anchor[torch.arange(len(folded)), growth.flatten(1).argmin(1)] = True
    return anchor.view_as(folded)
