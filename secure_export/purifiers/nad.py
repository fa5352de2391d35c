"""Neural Attention Distillation (Li et al., ICLR 2021): a student learns a fine-tuned teacher's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.errors import LoadError
from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

BETAS = (500.0, 1000.0, 1000.0)
SHARP = 2


class Nad(Published):
    """Aligns the student's attention maps with those of a teacher that was fine-tuned on the same samples.

    The paper names the last three stages of a wide residual network. Here a stage is a resolution: its last
    output, for the last three resolutions above one pixel. `layers` names others.
    """

    lr: float = Field(0.1, gt=0, description="of the first two passes; a tenth to pass 20, then 1e-4")
    momentum: float = Field(0.9, gt=0, lt=1, description="Nesterov's")
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(64, ge=2)
    teacher_epochs: int = Field(10, ge=1, description="passes that fine-tune the teacher")
    epochs: int = Field(20, ge=1, description="passes that distill")
    layers: tuple[str, ...] = Field((), description="qualified names, shallow first; () = by resolution")

    def remove(self, work: Work) -> None:
        """Teacher by cross-entropy; student by cross-entropy and attention."""
        student = work.model
        layers = self.layers or stages(student, work.fit.floats(slice(0, 2)), work.head_name)
        teacher = copy.deepcopy(student)
        with attention(teacher, layers) as taught, attention(student, layers) as learned:
            self._pass(work, teacher, "teacher", self.teacher_epochs, lambda _: torch.zeros(()))
            teacher.eval().requires_grad_(False)

            def difference(inputs: Tensor) -> Tensor:
                teacher(inputs)
                betas = BETAS[-len(layers) :] if len(layers) <= len(BETAS) else [BETAS[-1]] * len(layers)
                terms = [
                    beta * F.mse_loss(learned[name], taught[name].detach())
                    for beta, name in zip(betas, layers, strict=True)
                ]
                return torch.stack(terms).sum()

            self._pass(work, student, "distill", self.epochs, difference)

    def _pass(
        self, work: Work, model: nn.Module, phase: str, epochs: int, extra: Callable[[Tensor], Tensor]
    ) -> None:
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )

        def step(inputs: Tensor, labels: Tensor) -> float:
            loss = F.cross_entropy(model(inputs), labels) + extra(inputs)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.item()

        model.train()
        set_rate(optimizer, self.lr, 0)
        for done, _ in enumerate(work.passes(phase, epochs, step, model), start=1):
            set_rate(optimizer, self.lr, done)


def set_rate(optimizer: torch.optim.Optimizer, lr: float, epoch: int) -> None:
    """The official schedule: lr for two passes, lr / 10 up to pass 20, lr / 1000 after."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (1.0 if epoch < 2 else 0.1 if epoch < 20 else 0.001)


def stages(model: nn.Module, inputs: Tensor, head: str) -> tuple[str, ...]:
    """The last module that gives each of the last three resolutions, shallow first.

    Raises:
        LoadError: no module gives a feature map of more than one position.
    """
    last: dict[tuple[int, ...], str] = {}
    handles = []
    for name, module in model.named_modules():
        if name and name != head:

            def after(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and output.ndim > 2 and output[0, 0].numel() > 1:
                    last.pop(tuple(output.shape[2:]), None)
                    last[tuple(output.shape[2:])] = name

            handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise LoadError("no layer gives a feature map", hint="NAD needs convolutions: take another purifier")
    return tuple(last.values())[-len(BETAS) :]


@contextmanager
def attention(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The attention maps [N, positions] of each layer in the latest forward pass.

    Raises:
        LoadError: the model has no such layer.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for name in layers:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise LoadError(f"no layer {name!r} in the model", hint="mend `layers` of nad") from error

        def after(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            seen[name] = attention_map(output)

        handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_map(features: Tensor) -> Tensor:
    """sum_c |F_c|^2 per position, [N, positions], at unit L2 norm."""
    energy = features.abs().pow(SHARP).sum(1).flatten(1)
    normalized: Tensor = energy / (energy.norm(dim=1, keepdim=True) + 1e-6)
    return normalized
