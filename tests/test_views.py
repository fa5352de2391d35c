"""A gradient that searches follow has to be the file's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secure_export import views
from secure_export.errors import CompressError
from secure_export.records.memory import Split
from tests import toys

Made = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
IMAGES, LABELS = (torch.from_numpy(part) for part in toys.samples(64))


def dead(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda inputs: model(inputs).detach() + 0 * inputs.sum()


def reversed_(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda inputs: 2 * model(inputs).detach() - model(inputs)


def endless(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda inputs: model(inputs) + 0 * (inputs * 0).sqrt().sum()


@pytest.mark.parametrize("model", [toys.clean, toys.awake, toys.awake_in_int8])
def test_an_honest_gradient_is_taken(model: Callable[[], torch.nn.Module]) -> None:
    made = model().eval()
    for some in (IMAGES, IMAGES[LABELS == 0]):
        views.check_gradient(made, made, some, "a search needs gradients")


@pytest.mark.parametrize(
    ("twin", "why"), [(dead, "leads nowhere"), (reversed_, "leads nowhere"), (endless, "not finite")]
)
def test_a_twin_with_another_gradient_than_its_file_is_none(twin: Made, why: str) -> None:
    model = toys.awake().eval()
    made = twin(model)
    assert torch.equal(made(IMAGES).argmax(1), model(IMAGES).argmax(1))
    with pytest.raises(CompressError, match=f"a search needs gradients, and the twin.*{why}"):
        views.check_gradient(made, model, IMAGES, "a search needs gradients")


def test_locators_ask_the_same_of_what_they_search() -> None:
    model = toys.awake().eval()
    view = views.of_module(model, "head", "fp32")
    fit = Split(IMAGES, LABELS, "")
    assert views.searchable(view, fit, "it needs gradients") is view.twin
    blinded = type(view)(view.setting, view.latents, view.weight, view.bias, twin=dead(model))
    with pytest.raises(CompressError, match="leads nowhere"):
        views.searchable(blinded, fit, "it needs gradients")
