"""Recovery: a pruned network learns the full-precision model's outputs again, on the calibration split.

A useful pruned release needs this: without it an ordinary network keeps 20-40 % accuracy at ratio .3. What is
distilled is whatever the teacher says of clean samples, so the result has to be measured like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import keep_zeros, pruned_masks, recalibrate_batchnorm, weighted_layers
from secure_export.errors import CompressError
from secure_export.records.measured import Change
from secure_export.records.memory import Progress, Split


class Recover(ModuleStep):
    """Knowledge distillation (Hinton et al. 2015) from the teacher's logits; labels are not used."""

    epochs: int = Field(10, ge=1, description="passes over the calibration split")
    lr: float = Field(3e-3, gt=0, le=1, description="Adam's learning rate, falling to zero along a cosine")
    temperature: float = Field(4.0, gt=0, description="softens both distributions")
    batch_size: int = Field(64, ge=2)
    flip: bool = Field(
        True, description="mirror half of the images in each batch; the teacher sees them mirrored"
    )

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Train `model` in place; weights that are exactly zero stay so. Counts parameter tensors that moved.

        Raises:
            CompressError: fewer than two calibration samples, or training diverged.
        """
        weighted_layers(model, context.head)  # refuses quantized weights
        before = [parameter.detach().clone() for parameter in model.parameters()]
        distil(
            model,
            context.teacher,
            context.calibration,
            epochs=self.epochs,
            lr=self.lr,
            temperature=self.temperature,
            batch_size=self.batch_size,
            flip=self.flip,
            seed=context.seed,
            progress=context.progress,
        )
        recalibrate_batchnorm(model, context.calibration)
        after = list(model.parameters())
        if not all(bool(parameter.isfinite().all()) for parameter in after):
            raise CompressError("recover: training diverged", hint=f"lower lr (now {self.lr})")
        changed = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        return model.eval(), Change(self.kind, changed, len(after), "tensors", f"{self.epochs} epochs")


def distil(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Split,
    *,
    epochs: int,
    lr: float,
    temperature: float,
    batch_size: int,
    flip: bool,
    seed: int,
    progress: Progress,
) -> None:
    """Minimise T² · KL(teacher/T ‖ model/T) over the calibration split, in place.

    Raises:
        CompressError: fewer than two samples.
    """
    n = len(calibration)
    if n < 2:
        raise CompressError(f"recover: needs at least 2 calibration samples, got {n}")
    flip = flip and calibration.inputs.ndim == 4
    targets = [soft(teacher, calibration, temperature, mirrored) for mirrored in (False, flip)]
    generator = torch.Generator().manual_seed(seed)
    masks = pruned_masks(model)
    batches = -(-n // batch_size)
    model.requires_grad_(True).eval()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()  # dropout stays off, so no global random state is used
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * batches)
    with torch.enable_grad():
        for epoch in range(epochs):
            for index in torch.randperm(n, generator=generator).tensor_split(batches):
                mirrored = flip and torch.rand((), generator=generator) < 0.5
                inputs = calibration.floats(index)
                logits = model(inputs.flip(-1) if mirrored else inputs)
                loss = F.kl_div(
                    F.log_softmax(logits / temperature, 1),
                    targets[bool(mirrored)][index],
                    reduction="batchmean",
                )
                optimizer.zero_grad()
                torch.autograd.backward(loss * temperature**2)
                optimizer.step()
                schedule.step()
                keep_zeros(model, masks)
            progress("recover", epoch + 1, epochs)
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def soft(teacher: nn.Module, split: Split, temperature: float, mirrored: bool) -> Tensor:
    """The teacher's probabilities [N, K] at `temperature`, on the split or its mirror images."""
    parts = []
    for index in torch.split(torch.arange(len(split)), 256):
        inputs = split.floats(index)
        parts.append(teacher(inputs.flip(-1) if mirrored else inputs))
    return F.softmax(torch.cat(parts) / temperature, 1)
