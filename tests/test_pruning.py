"""Zeros in place of channels are the pruned network, differentiable; purifiers and attackers rely on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from benchmarks import networks
from secure_export import pruning
from secure_export.compressors.prune_structured import prune
from secure_export.purifiers._draws import Draws
from secure_export.records.memory import Split

HEAD = "fc"


def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.named("resnet18_w8").eval()


@pytest.mark.parametrize("importance", ["group-l1", "own-l1"])
@pytest.mark.parametrize("trained", [True, False])
def test_zeroed_channels_are_those_of_the_deployers_file(
    importance: pruning.Importance, trained: bool
) -> None:
    model, x = network().requires_grad_(trained), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        zeroed = functional_call(model, pruning.zeroed(model, HEAD, x[:1], 0.4, importance), (x,))
    assert all(parameter.requires_grad == trained for parameter in model.parameters())
    prune(model, HEAD, x[:1], ratio=0.4, importance=importance, global_pruning=False)
    torch.testing.assert_close(model(x), zeroed, atol=1e-5, rtol=0)


def test_gradients_reach_what_is_left_and_nothing_else() -> None:
    model, x = network(), torch.rand(4, 3, 16, 16)
    weights = pruning.zeroed(model, HEAD, x[:1], 0.5, "group-l1")
    functional_call(model, weights, (x,)).square().sum().backward()
    name = "stem.weight" if "stem.weight" in weights else next(iter(weights))
    alive = weights[name].detach().flatten(1).abs().sum(1) > 0
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    assert 0 < int(alive.sum()) < len(alive)
    assert torch.equal(gradient.flatten(1).abs().sum(1) > 0, alive)


class Tangled(nn.Module):
    """A network that torch-pruning cannot trace: its way depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad or torch.is_grad_enabled():
            raise RuntimeError("not with gradients")
        out: torch.Tensor = self.fc(self.body(x).mean((2, 3)))
        return out


def drawn(model: nn.Module) -> set[str]:
    inputs = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    fit = Split(inputs, torch.zeros(8, dtype=torch.long), "0")
    draws = Draws((1.0, 0.0), (0.1, 0.5), HEAD, {}, fit, 4, torch.Generator().manual_seed(0))
    draws.only_followable(model)
    return {draws.pruned().cut for _ in range(8)}


def test_channels_are_drawn_as_deployers_remove_them() -> None:
    assert drawn(network()) == {"filters", "weights", "group-l1", "own-l1"}


def test_what_torch_pruning_cannot_follow_is_masked_alone() -> None:
    assert drawn(Tangled().eval()) == {"filters", "weights"}
